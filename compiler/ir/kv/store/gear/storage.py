"""GEAR: quantized, with the error's low-rank part and sparse outliers beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ......errors import IRError
from ..kivi.storage import Kivi
from ..packed import Piece, check_divides
from ..storage import GroupShape

#: An outlier's place in its vector is one byte.
PLACES = 256


@dataclass(frozen=True)
class Gear(Kivi):
    """KIVI's codes, plus a low-rank part of their error, plus outliers (Kang et al. 2024, section 3).

    Of each vector (a channel of a granule's keys, a token's value in a head) a `share` is set aside before
    the others are quantized, half of it the largest numbers and half the smallest, to the nearest whole
    count. So their number is fixed and nothing overflows: what is no outlier by count is quantized, however
    large it is. `rank` columns approximate the error of each head and granule of `tokens` tokens, by power
    iteration.
    """

    tokens: int = 128
    rank: int = 2
    share: float = 0.02

    name = "gear"

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
