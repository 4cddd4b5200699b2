"""ShadowKV: the pages whose landmarks have the largest products with a query, and those that these miss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ......errors import IRError
from ..pages.paged import Paged
from ..reader import READERS
from .numbers import numbers_of

#: Outliers of a head at most: they are read in every step.
_MOST_OUTLIERS = 4096


@READERS.register
@dataclass(frozen=True)
class ShadowKV(Paged):
    """Reads the pages whose mean key a query asks for, and outliers (ShadowKV, Sun et al. 2024, section 4).

    Before: `cache 2.0 heads=0,1 .. policy=full storage=f32`
    After:  `cache 2.0 heads=0,1 .. policy=full storage=f32 read=shadowkv(page=4,share=0.125,..)`

    Beside the slots stand, of every page of so many slots, its landmark, the mean m of its keys k, and a
    number that says how far they are apart:

        127 (1 - |m|^2 / mean |k|^2)

    which is 0 where they are all alike. A query reads the pages whose landmarks have the largest products
    with it, and `outliers` pages of each KV head whose number is the largest, whatever it asks.

    Options: `page`, slots of a page, a power of two; a query reads `share` of the tokens that it sees, or
    `tokens` where that is more, in whole pages, beside its outliers, and everything where there are no more
    pages; the first `skip_layers` attention layers read everything.

    Measured on SmolLM2-135M-Instruct, recall behind 1,000 and 4,000 tokens: 0.70 and 0.60 by the defaults,
    0.70 and 0.65 with every token, at a KL of 0.0001; a step reads 84 % and 35 % of the bytes that it reads
    of all.

    Differs from the paper: only its choice is here. Its keys of low rank and its values elsewhere are not:
    keys and values stay in slots of any plain storage. Pages are of 4 tokens, for the paper's 8 lose what
    stands in one line of a list. An outlier is a page whose mean is short beside its keys, the paper's is one
    with a key of the smallest cosine with the mean; as many are chosen, 48, but anew in every step, among
    all pages but the first and the newest two, which are always read, where the paper chooses once among
    those of the prompt. The paper reads 32 recent tokens always. Of int8 slots a landmark is the mean of
    codes, rounded. Query heads that share a KV head read the same pages, a page counting as much as the
    largest share that it has of any of them, as in the paper's code. The first two layers read everything
    here, and so may a step of several tokens, as of a prompt: in onnxruntime and Triton it does.
    """

    outliers: int = 48

    name = method = "shadowkv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.outliers <= _MOST_OUTLIERS:
            raise IRError(
                f"{self.name}: outliers is a number of pages of a head, 0 to {_MOST_OUTLIERS}, not "
                f"{self.outliers}"
            )

    @property
    def widens(self) -> bool:
        return True

    @property
    def apart(self) -> int:
        return self.outliers

    def bound_numbers(self, key_size: int) -> int:
        return key_size + 1

    def numbers_of(self, keys_KPND: Any) -> Any:
        return numbers_of(keys_KPND)

    def says(self) -> str:
        return super().says() + (f" and {self.outliers} outliers" if self.outliers else "")

    @property
    def statistic(self) -> Any:
        from .statistic import Landmarks

        return Landmarks()
