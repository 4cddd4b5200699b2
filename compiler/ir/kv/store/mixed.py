"""Tokens that matter in more bits than the others, as ZipCache and MiKV have it.

Attention over packed tokens does not ask for their order, so a granule's tokens are stored in two parts, a
fixed number of those that got the most attention and the rest. Both capacities are fixed at compile time.
"""

from __future__ import annotations

from dataclasses import dataclass

from .....errors import IRError
from ...options import derived, missing, option, settle
from .packed import CODES, Packed, check_bits


@dataclass(frozen=True)
class Mixed(Packed):
    """Of each granule of `tokens` tokens `salient` in `high` bits, the rest in `low` bits.

    `salient` is a `share` of them, to the nearest multiple of 8.
    """

    high: int = 4
    low: int = 2
    salient: int = derived()
    tokens: int = 128
    share: float = option(0.5)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise IRError(f"the share of salient tokens is from 0 to 1, not {self.share}")
        if missing(self.salient):  # to the nearest multiple, as codes are packed
            settle(self, salient=CODES * round(self.share * self.tokens / CODES))
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
    def per_query(self) -> bool:
        """Whether a token's attention counts over the number of queries that could see it."""
        return False

    @property
    def parts(self) -> tuple[tuple[str, int, int], ...]:
        """(name, tokens a granule, bits) of the two parts."""
        return ("high", self.salient, self.high), ("low", self.tokens - self.salient, self.low)
