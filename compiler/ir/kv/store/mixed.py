"""ZipCache and MiKV: tokens that matter in more bits than the others.

Attention over packed tokens does not ask for their order, so a granule's tokens are stored in two parts, a
fixed number of those that got the most attention and the rest. Both capacities are fixed at compile time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .....errors import IRError
from .packed import CODES, Packed, Piece, by_channel, by_token, check_bits, check_divides
from .storage import GroupShape


@dataclass(frozen=True)
class Mixed(Packed):
    """Of each granule of `tokens` tokens `salient` in `high` bits, the rest in `low` bits."""

    high: int = 4
    low: int = 2
    salient: int = 64
    tokens: int = 128

    def __post_init__(self) -> None:
        self.check_waiting()
        check_bits(self.name, self.high, self.low)
        if self.high < self.low:
            raise IRError(
                f"{self.name}: salient tokens get as many bits as the rest or more, "
                f"not {self.high} beside {self.low}"
            )
        if not 0 < self.salient < self.tokens or self.salient % CODES or self.tokens % CODES:
            raise IRError(
                f"{self.name}: a granule and its salient tokens are multiples of {CODES}, fewer salient "
                f"than all but more than none, not {self.salient} of {self.tokens}; change tokens, or the "
                "share of them that is salient"
            )

    @property
    def granule(self) -> int:
        return self.tokens

    @property
    def scored(self) -> bool:
        return True

    @property
    def parts(self) -> tuple[tuple[str, int, int], ...]:
        """(name, tokens a granule, bits) of the two parts."""
        return ("high", self.salient, self.high), ("low", self.tokens - self.salient, self.low)


@dataclass(frozen=True)
class ZipCache(Mixed):
    """Keys by channel, values by token once each channel is divided by the square root of its largest
    magnitude (channel-separable, He et al. 2024, section 4.1); salient tokens by normalized attention
    (section 4.2)."""

    name = "zipcache"

    def pieces(self, shape: GroupShape) -> Iterator[Piece]:
        for part, tokens, bits in self.parts:
            yield from by_channel(f"{part}_key", bits, tokens, tokens, shape.key_size)
            size = shape.value_size
            yield from by_token(f"{part}_value", bits, tokens, size, size)
        yield Piece("value_norm", 1, shape.value_size, "f16")


@dataclass(frozen=True)
class MiKV(Mixed):
    """Keys and values by token over `group` channels; keys balanced against the queries' outlier channels
    first (Yang et al. 2024, section 3.2). What other methods would evict stays, in `low` bits."""

    high: int = 8
    salient: int = 32
    group: int = 32

    name = "mikv"

    @property
    def balanced(self) -> bool:
        return True

    def check(self, shape: GroupShape) -> None:
        super().check(shape)
        for part in ("key", "value"):
            size = shape.size(part)
            check_divides(self.name, "group", self.group, f"{part} size of a head,", size)

    def pieces(self, shape: GroupShape) -> Iterator[Piece]:
        for part, tokens, bits in self.parts:
            for of in ("key", "value"):
                yield from by_token(f"{part}_{of}", bits, tokens, self.group, shape.size(of))
        yield Piece("key_balance", 1, shape.key_size, "f16")
