"""D2O's tokens: evicted by attention, and merged into their likeness above a moving threshold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .....errors import IRError
from ..sizes import Size
from .heavy_hitters import HeavyHitters
from .merging import average, directions, nearest
from .policy import POLICIES, Floats, Ints, Row


@POLICIES.register
@dataclass(frozen=True)
class Matched(HeavyHitters):
    """Keeps what H2O keeps, and merges what leaves into the token that resembles it most, where that is more
    than what left lately resembled any (Wan et al. 2024, section 3.3).

    A layer's pass of the method d2o gives it its budget. Of the tokens that leave together the mean cosine to
    the nearest kept key moves the threshold: it counts `newer`, and what the threshold was the rest. Weights
    are the exponentials of cosines, of 1 for the token itself.
    """

    newer: float = 0.7

    name = "matched"
    method = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.newer <= 1:
            raise IRError(
                f"{self.name}: newer is a share of the threshold, more than 0 to 1, not {self.newer}"
            )

    @property
    def mixes(self) -> bool:
        return True

    def buffers(
        self, batch: Size, heads: int, key_size: int, reading: bool
    ) -> Iterator[tuple[str, tuple[Size, ...]]]:
        """`threshold`: of each head the threshold, and whether there is one yet, 0 or 1."""
        yield "threshold", (batch, heads, 2)

    def says(self) -> str:
        return f"{self.heavy} heavy hitters, {self.recent} recent tokens, and what they resemble in them"

    def take_in(self, row: Row, score_KT: Floats, staying_KN: Ints) -> None:
        """Averages each token that leaves into the kept one that it resembles most, from the threshold on."""
        used = int(staying_KN.max()) + 1
        for head, kept_N in enumerate(staying_KN):
            leaving_L = np.setdiff1d(np.arange(used), kept_N)
            into_L, cosine_L = nearest(directions(row, head, used), leaving_L, kept_N)
            alike = cosine_L >= self.moved(row["threshold"][head], float(cosine_L.mean()))
            average(
                row,
                head,
                kept_N,
                np.full(len(kept_N), np.e, np.float32),
                leaving_L[alike],
                into_L[alike],
                np.exp(cosine_L[alike]),
            )

    def moved(self, threshold_2: Floats, mean: float) -> float:
        """The threshold, moved by the mean cosine of what leaves now."""
        before, known = float(threshold_2[0]), float(threshold_2[1])
        now = self.newer * mean + (1 - self.newer) * before if known else mean
        threshold_2[0], threshold_2[1] = now, 1
        return now
