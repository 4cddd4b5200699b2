"""Which units of experts stay in memory from token to token: an eviction policy gives each a score.

    index [T, choices] of a layer -> experts, by number -> their units, each with a score -> the highest stay

Units are places in a file (pages.py). One may have parts of several experts; it counts for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: What is left of a unit's count when the next token is counted.
FADES = 0.98


@dataclass(frozen=True)
class Routed:
    """Units of an item whose tokens choose experts."""

    always: tuple[int, ...]
    """What every token reads."""
    experts: Mapping[int, tuple[int, ...]]
    """What those read that choose an expert, by its number; others of the layer are in another item."""
    choices: int
    """Experts of these that a token chooses at most."""
    layer: int
    """Of items behind each other that are of the same layer one choice says which experts are read."""

    @property
    def most(self) -> int:
        """Units that one token reads at most."""
        return len(self.always) + self.choices * max(map(len, self.experts.values()), default=0)

    def asked(self, index: npt.NDArray[np.int64]) -> set[int]:
        """What tokens read that chose so, [T, choices]."""
        return {
            *self.always,
            *(unit for expert in self.chosen(index) for unit in self.experts[expert]),
        }

    def chosen(self, index: npt.NDArray[np.int64]) -> list[int]:
        """Experts of these that any of the tokens chose."""
        return [expert for expert in np.unique(index).tolist() if expert in self.experts]


@dataclass(frozen=True)
class Hits:
    """What of experts steps of one token found in memory, since the model was loaded."""

    asked: int
    """Units of experts that tokens asked for, of 2 MiB each."""
    held: int
    """Those of them that had stayed from the tokens before."""
    rate: float
    """Their part, from 0 to 1; 0 where nothing was asked for."""

    def sentence(self) -> str:
        """For people."""
        return (
            f"{100 * self.rate:.0f} % of the experts that tokens asked for were held: {self.held:,} of "
            f"{self.asked:,} units of 2 MiB"
        )


class Recent:
    """LRU: what was asked for last stays."""

    def __init__(self, units: int) -> None:
        """`units` are those of the file."""
        self.scores = np.zeros(units)
        self._clock = 0

    def step(self, tokens: int) -> None:
        """So many tokens come, in every layer."""

    def chose(self, routed: Routed, index: npt.NDArray[np.int64]) -> None:
        """The tokens of a layer chose so, [T, choices]."""
        for token, row in enumerate(index.tolist(), 1):
            for expert in row:
                units = list(routed.experts.get(expert, ()))
                self.scores[units] = self._clock + token / len(index)
        self._clock += 1
        self.scores[list(routed.always)] = self._clock


class Frequent:
    """LFU with aging: what was asked for most stays, and each token counts `FADES` of the next.

    The counts of LRFU (Lee et al., 2001), which lies between LRU and LFU.
    """

    def __init__(self, units: int) -> None:
        """`units` are those of the file."""
        self.scores = np.zeros(units)

    def step(self, tokens: int) -> None:
        """So many tokens come, in every layer."""
        self.scores *= FADES**tokens

    def chose(self, routed: Routed, index: npt.NDArray[np.int64]) -> None:
        """The tokens of a layer chose so, [T, choices]."""
        weights = FADES ** np.arange(len(index) - 1, -1, -1.0)
        for row, weight in zip(index.tolist(), weights.tolist(), strict=True):
            for expert in row:
                self.scores[list(routed.experts.get(expert, ()))] += weight
        self.scores[list(routed.always)] += weights.sum()


def best(units: Iterable[int], scores: npt.NDArray[np.float64], room: int) -> set[int]:
    """As many of the units as there is room for, those of the highest scores."""
    ordered = sorted(units, key=lambda unit: (-scores[unit], unit))
    return set(ordered[: max(room, 0)])
