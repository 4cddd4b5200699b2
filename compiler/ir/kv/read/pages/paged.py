"""Readers of pages: so many slots side by side are taken or left together, by a statistic of their keys.

    score = max over a group's heads of softmax over pages(parts of the query . statistic of the page)

A query reads the pages that score highest, beside the first page, the newest and, where a reader says so,
those whose keys are most apart. Readers differ in the statistic and in what of a query it is multiplied with:
`statistic` in torch, and what each target has of the same (`codegen/onnx/page_statistics.py`,
`codegen/triton/attention/choosing_statistics.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ......errors import IRError
from ....options import option
from ..reader import Reader

#: Slots of a page at most: the newest pages are read whole.
_LARGEST = 1024


@dataclass(frozen=True)
class Paged(Reader):
    """Options: `page`, slots of a page, a power of two; a query reads `share` of the tokens that it sees, or
    `tokens` where that is more, in whole pages, and everything where there are no more pages; the first
    `skip_layers` attention layers read everything."""

    page: int = 4
    share: float = 0.125
    tokens: int = 512
    skip_layers: int = option(2)

    always: ClassVar[int] = 3
    """Pages that are always read: the first, whose tokens take most of the attention whatever is asked, and
    the newest two, so that a query just behind an edge has the tokens before it."""

    def __post_init__(self) -> None:
        if not 2 <= self.page <= _LARGEST or self.page & (self.page - 1):
            raise IRError(
                f"{self.name}: a page has a power of two of tokens, 2 to {_LARGEST}, not {self.page}"
            )
        if not 0 <= self.share <= 1:
            raise IRError(f"{self.name}: share is a part of the tokens, 0 to 1, not {self.share}")
        if self.tokens < 0 or 0 < self.tokens < self.always * self.page:
            raise IRError(
                f"{self.name}: the first page and the newest two are always read, so tokens is 0 or at least "
                f"{self.always} pages of {self.page} ({self.always * self.page}), not {self.tokens}"
            )
        if not self.share and not self.tokens:
            raise IRError(f"{self.name}: give a share of the tokens or a number of tokens to read")
        if self.skip_layers < 0:
            raise IRError(f"{self.name}: skip_layers is 0 or more, not {self.skip_layers}")

    @property
    def bounded(self) -> int:
        return self.page

    @property
    def widens(self) -> bool:
        """Whether the statistic is found of float32, whatever the keys are."""
        return False

    @property
    def apart(self) -> int:
        """Pages that are read beside what is chosen, because their keys are most apart: how far is the last
        number of their statistic."""
        return 0

    def leaves(self, place: int) -> str:
        if place >= self.skip_layers:
            return ""
        return f"are of the first {self.skip_layers} layers, which read everything"

    def reads(self, tokens: int) -> int:
        return min(tokens, self.page * self.pages(tokens))

    def pages(self, tokens: int) -> int:
        """Pages that a query reads which sees so many tokens, if there are so many."""
        # As code in floating point has it.
        wanted = max(float(self.tokens), self.share * tokens) / self.page
        return max(self.always, math.ceil(wanted)) + self.apart

    def says(self) -> str:
        parts = [f"{self.share:g} of the tokens"] if self.share else []
        parts += [f"{self.tokens} tokens"] if self.tokens else []
        more = ", or what is more," if len(parts) == 2 else ""
        return f"{' or '.join(parts)}{more} in pages of {self.page}"

    @property
    def choosing(self) -> Any:
        from . import choosing

        return choosing

    @property
    def statistic(self) -> Any:
        """What scores a page, in torch; imported by this.

        `statistic.of_pages(keys_BKPND)` gives the statistic of whole pages [B, K, P, E], in the keys' type,
        and `statistic.asked(q_BKGSD)` what of a query it is multiplied with [B, K, G, S, E].
        """
        raise NotImplementedError


def in_type_of(keys_KPND: Any, found: Any) -> Any:
    """A statistic in the type of the keys, in NumPy; rounded where these are codes."""
    whole = np.floor(found + np.float32(0.5)) if keys_KPND.dtype.kind == "i" else found
    return whole.astype(keys_KPND.dtype)
