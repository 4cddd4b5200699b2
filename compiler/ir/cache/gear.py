"""GEAR: quantized, with the error's low-rank part and sparse outliers beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ....errors import IRError
from .kivi import Kivi
from .packing import Piece, check_divides
from .storage import GroupShape

#: An outlier's place in its vector is one byte.
PLACES = 256


@dataclass(frozen=True)
class Gear(Kivi):
    """KIVI's codes, plus a low-rank part of their error, plus outliers (Kang et al. 2024, section 3).

    Of each vector (a channel of a granule's keys, a token's value) the `outliers` largest and as many
    smallest numbers are set aside before the others are quantized. Their number is fixed, so there is no
    overflow: what is no outlier by count is quantized, however large it is. `rank` columns approximate the
    error of each head and granule of `tokens` tokens, by power iteration.
    """

    tokens: int = 128
    rank: int = 2
    outliers: int = 1

    name = "gear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides(self.name, "group", self.group, "granule", self.tokens)
        if self.tokens > PLACES:
            raise IRError(
                f"{self.name}: a granule has up to {PLACES} tokens, so that an outlier's place is "
                f"a byte, not {self.tokens}"
            )
        if self.rank < 0 or self.outliers < 0:
            raise IRError(
                f"{self.name}: rank and outliers are 0 or more, not {self.rank} and {self.outliers}"
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
            if 2 * self.outliers > min(self.tokens, size):
                raise IRError(
                    f"{self.name}: {self.outliers} outliers at each end are more than a vector of "
                    f"{min(self.tokens, size)} numbers has"
                )

    def pieces(self, shape: GroupShape) -> Iterator[Piece]:
        yield from super().pieces(shape)
        for part in ("key", "value"):
            if self.rank:
                yield Piece(f"{part}_left", self.tokens, self.rank, "f16")
                yield Piece(f"{part}_right", shape.size(part), self.rank, "f16")
        if self.outliers:
            of_key = (2 * self.outliers, shape.key_size)
            of_value = (self.tokens, 2 * self.outliers)
            for part, size in (("key", of_key), ("value", of_value)):
                yield Piece(f"{part}_place", *size, "u8")
                yield Piece(f"{part}_outlier", *size, "f16")
