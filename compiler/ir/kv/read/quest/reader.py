"""Quest: the pages whose keys can have the largest products with a query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ......errors import IRError
from ..pages.paged import Paged, in_type_of
from ..reader import READERS

#: Tokens that are put in order together at most: a step waits for it.
_MOST_ALIKE = 4096


@READERS.register
@dataclass(frozen=True)
class Quest(Paged):
    """Reads the pages that bounds of their keys promise most of (Quest, Tang et al. 2024, section 3).

    Before: `cache 2.0 heads=0,1 .. policy=full storage=f32`
    After:  `cache 2.0 heads=0,1 .. policy=full storage=f32 read=quest(page=4,share=0.125,..)`

    A page is so many slots side by side. Beside the slots stand, of every page and channel, the largest and
    the smallest number of its keys, so that of a query q no product with a key of the page is above

        sum over channels d of max(q_d * largest_d, q_d * smallest_d)

    A query reads the pages that score highest.

    Options: `page`, slots of a page, a power of two; a query reads `share` of the tokens that it sees, or
    `tokens` where that is more, in whole pages, and everything where there are no more pages; `spread`, how
    far from the middle between largest and smallest to either of them a score counts (1: the bound); `alike`
    tokens at a time are put in such an order that a page has like keys (0: pages are as the text goes); the
    first `skip_layers` attention layers read everything, as in the paper. With `linear` = a above 0 a page
    has one number of each channel, a largest_d + (1 - a) smallest_d, and its score is their product with the
    query (MPCache, Zeng et al. 2025, whose code has 0.6): half as many numbers, and `spread` says nothing.

    Measured on SmolLM2-135M-Instruct, recall behind 1,000 and 4,000 tokens: 0.70 and 0.65 by the defaults, as
    with every token, at a KL of 0.0007; a step reads 78 % and 42 % of the bytes that it reads of all.

    Differs from the paper: the first page and the newest two are read whatever their score, and count among
    the chosen. With a spread below 1 a score estimates the largest product in place of bounding it, for in 64
    channels the bound is far above every product; the paper's is `spread=1`, and its budget a number of
    tokens (`share=0`). Query heads that share a KV head read the same pages: a head's scores become shares
    by a softmax over all pages, and a page counts as much as the largest share that it has of any of these
    heads. The paper's models have no heads that share. A step of several tokens, as of a prompt, may read
    everything: in onnxruntime it does. `alike` is not Quest's: clusters of keys are Squeezed Attention's
    (Hooper et al. 2024), but of one size and judged by bounds; `page=8,alike=256,spread=0.35` keeps half as
    many bounds, at a KL of 0.012 for 0.011 behind 4,000 tokens and 0.004 for 0.004 behind 7,000, and finds
    one and three answers of forty fewer. `linear` is MPCache's, whose two levels of clusters and whose choice
    for two layers at once are not here: they cost more than they save.
    """

    spread: float = 0.5
    alike: int = 0
    linear: float = 0.0

    name = method = "quest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.spread <= 1:
            raise IRError(
                f"{self.name}: spread goes from the middle of a page's numbers to their edge, 0 to 1, not "
                f"{self.spread}"
            )
        if not 0 <= self.linear <= 1:
            raise IRError(
                f"{self.name}: linear is a part of a page's largest numbers, 0 to 1, where 0 scores by both "
                f"them and the smallest, not {self.linear}"
            )
        if self.alike and not (
            2 * self.page <= self.alike <= _MOST_ALIKE and self.alike & (self.alike - 1) == 0
        ):
            raise IRError(
                f"{self.name}: alike is 0, or a power of two of tokens from two pages of {self.page} to "
                f"{_MOST_ALIKE}, not {self.alike}"
            )

    def bound_numbers(self, key_size: int) -> int:
        return key_size if self.linear else 2 * key_size

    def numbers_of(self, keys_KPND: Any) -> Any:
        largest, smallest = keys_KPND.max(2), keys_KPND.min(2)
        if not self.linear:
            return np.concatenate((largest, smallest), -1)
        part, rest = np.float32(self.linear), np.float32(1 - self.linear)
        return in_type_of(keys_KPND, part * largest + rest * smallest)

    @property
    def reorders(self) -> bool:
        return bool(self.alike)

    def chunks(self, used: int) -> range:
        """The first page stays as it is, and so do the newest ones, which are read whatever they hold."""
        if not self.alike:
            return range(0)
        whole = max(0, used - self.always * self.page) // self.alike
        return range(self.page, self.page + whole * self.alike, self.alike)

    def says(self) -> str:
        alike = f" of like keys among {self.alike}" if self.alike else ""
        return f"{super().says()}{alike}"

    @property
    def statistic(self) -> Any:
        from .statistic import Between, Bounds

        return Between(self.linear) if self.linear else Bounds(self.spread)
