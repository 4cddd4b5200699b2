"""GEAR: quantized, with the error's low-rank part and sparse outliers beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ......errors import IRError
from ..kivi.storage import Kivi
from ..packed import check_divides
from ..storage import STORAGES, GroupShape, Piece

#: An outlier's place in its vector is one byte.
PLACES = 256


@STORAGES.register
@dataclass(frozen=True)
class Gear(Kivi):
    """Packs older tokens into `bits` bits a number and stores what that loses (Kang et al. 2024, section 3).

    Before: `cache 0.0 heads=0,1 .. policy=full storage=f32`
    After:  `cache 0.0 heads=0,1 .. policy=full storage=gear(..,tokens=128,rank=2,share=0.02)`

    Options: as for KIVI, whose codes are the backbone; `tokens`, a granule, which is decomposed as one;
    `rank` of each head's error in a granule (the paper: 4 for prompts, 2 for what is generated); `share`
    of each vector's numbers that are set aside as outliers, half of them the largest and half the
    smallest (the paper: 0.02), to the nearest whole count: 0.02 is one at each end of 128 numbers, and none
    of a token's value in a head of 32.

    Their number is fixed at compile time: what is no outlier by count is quantized, and nothing overflows.

    Measured on SmolLM2-135M-Instruct, recall behind 1,000 and 4,000 tokens: 0.40 and 0.20 by the defaults, at
    a KL of 0.034 and 21 % of the bytes, against 0.70 and 0.65 of the whole cache; with as many bytes `kivi`
    and `turboquant` in 4 bits lose almost nothing.

    Differs from the paper: the low-rank part is of each granule and not of the whole prompt, so that both
    ways of prefilling give the same form; an outlier's vector is a channel of a granule's keys or a token's
    value in one head.
    """

    tokens: int = 128
    rank: int = 2
    share: float = 0.02

    name = method = "gear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides(self.name, "group", self.group, "granule", self.tokens)
        if self.tokens > PLACES:
            raise IRError(
                f"{self.name}: a granule has up to {PLACES} tokens, so that an outlier's place is "
                f"a byte, not {self.tokens}"
            )
        if self.rank < 0 or not 0 <= self.share < 1:
            raise IRError(
                f"{self.name}: the rank is 0 or more and the share of outliers from 0 to less than 1, "
                f"not {self.rank} and {self.share}"
            )

    @property
    def granule(self) -> int:
        return self.tokens

    def check(self, shape: GroupShape) -> None:
        super().check(shape)
        for part in ("key", "value"):
            size = shape.size(part)
            if size > PLACES:
                raise IRError(f"{self.name}: heads have up to {PLACES} channels, not {size}")
            if self.rank > min(self.tokens, size):
                raise IRError(
                    f"{self.name}: rank {self.rank} is more than a head's {size} channels"
                )

    def outliers(self, numbers: int) -> int:
        """Outliers at each end of a vector of so many numbers."""
        return round(self.share * numbers / 2)

    def pieces(self, shape: GroupShape) -> Iterator[Piece]:
        yield from super().pieces(shape)
        for part in ("key", "value"):
            if self.rank:
                yield Piece(f"{part}_left", self.tokens, self.rank, "f16")
                yield Piece(f"{part}_right", shape.size(part), self.rank, "f16")
        of_key = (2 * self.outliers(self.tokens), shape.key_size)
        of_value = (self.tokens, 2 * self.outliers(shape.value_size))
        for part, size in (("key", of_key), ("value", of_value)):
            if min(size):
                yield Piece(f"{part}_place", *size, "u8")
                yield Piece(f"{part}_outlier", *size, "f16")
