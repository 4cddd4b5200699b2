"""TurboQuant: codes of one fixed table for all tokens, behind a rotation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ......errors import IRError
from ....options import later, missing, option, settle, stated
from ...sizes import Size, divided_up
from ..packed import CHOSEN, GRANULES, Packed, codes_by_token, settle_bits
from ..storage import STORAGES, GroupShape, Piece

#: How levels may be spread.
LEVELS = ("even", "normal")


@STORAGES.register
@dataclass(frozen=True)
class TurboQuant(Packed):
    """Packs older tokens into `bits` bits a number and one scale a token (Zandieh et al. 2025, section 3.1).

    Before: `cache 0.0 heads=0,1 .. policy=full storage=f32`
    After:  `cache 0.0 heads=0,1 .. policy=full storage=turboquant(..,key_bits=4,value_bits=4,group=64,..)`

    The graph rotates the channels of keys and values, which spreads what stands out over all of them: then
    the numbers of any token, over their length, are spread as a normal distribution, and the same levels
    serve all. From keys the mean of each `group` of tokens is taken away before, which is most of many a
    channel.

    Options: `key_bits` and `value_bits` where they differ from `bits`; `levels`, `even`ly spread (codes of 4
    bits are by default, and onnxruntime multiplies them as integers) or those that lose the least of a
    `normal` distribution (all others are); `group`, tokens that are packed together and share the mean of
    their keys; `sinks` and `residual`, the first and the newest tokens, which stay as they are; `slack`, how
    many more may gather before the oldest are packed; `prefill`, `exact` (attend to the prompt in full
    precision, then pack it) or `streaming` (pack after every chunk).

    Measured on SmolLM2-135M-Instruct, in onnxruntime, recall behind 1,000 and 4,000 tokens: 0.70 and 0.60 by
    the defaults, against 0.70 and 0.65 of the whole cache (one of 20 questions), at a KL of 0.0011 and a
    fifth of the bytes behind 4,000.

    Differs from the paper: the rotation is a Hadamard matrix, not a random one; a token's scale is the one
    that loses the least for its codes, not its length; levels of 4 bits are spread evenly, a token's codes
    being the best of a few; the mean of keys and the first tokens are kept apart; keys have all of their
    bits from levels, where the paper's for products spend one on the signs of a random projection of what the
    others lose.
    """

    key_bits: int = later()
    value_bits: int = later()
    group: int = 64
    levels: str = stated()
    bits: int = option(4)

    name = method = "turboquant"

    def __post_init__(self) -> None:
        settle_bits(self)
        bits = (self.key_bits, self.value_bits)
        if missing(self.levels):
            settle(self, levels="even" if bits == (4, 4) else "normal")
        if self.levels not in LEVELS:
            raise IRError(
                f"{self.name}: levels are {' or '.join(LEVELS)}, not {self.levels[:40]!r}"
            )
        self.check_waiting()
        if self.group < 1:
            raise IRError(f"{self.name}: 1 or more tokens are packed together, not {self.group}")

    @property
    def rotated(self) -> tuple[str, ...]:
        return CHOSEN["both"]

    @property
    def granule(self) -> int:
        return self.group

    @property
    def in_arrays(self) -> bool:
        return self.even

    @property
    def even(self) -> bool:
        """Whether a code's level is a multiple of its token's scale."""
        return self.levels == "even"

    @property
    def integral(self) -> bool:
        return self.even and self.key_bits == self.value_bits == 4

    def granules(self, tokens: Size) -> Size:
        found = super().granules(tokens)
        return divided_up(found, GRANULES) * GRANULES if self.even else found

    def pieces(self, shape: GroupShape) -> Iterator[Piece]:
        yield Piece("key_mean", 1, shape.key_size, "f16")
        for part, bits in (("key", self.key_bits), ("value", self.value_bits)):
            yield from codes_by_token(part, bits, self.group, shape.size(part))
            yield Piece(f"{part}_scale", self.group, 1, "f16")
