"""Accurate Block Quantization: block floating point, with channels that are alike in the same blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ......errors import IRError
from ....options import later, option
from ...sizes import Size, divided_up
from ..packed import CHOSEN, GRANULES, Packed, check_divides, codes_by_token, settle_bits
from ..storage import STORAGES, GroupShape, Piece

#: Bits that a mantissa may have, its sign among them.
MANTISSAS = (3, 4, 6, 8)


@STORAGES.register
@dataclass(frozen=True)
class Abq(Packed):
    """Packs tokens into mantissas of `bits` bits under exponents of blocks (Trukhanov & Soloveychik 2024).

    Before: `cache 0.0 heads=0,1 .. policy=full storage=f32`
    After:  `cache 0.0 heads=0,1 .. storage=abq(..,key_bits=4,value_bits=4,block=16,order=keys,..)`, and the
    weight `cache.0.0.key_order` [heads, size]

    `block` channels of a token share an exponent of 8 bits (block floating point), so that a large channel
    takes the bits of its neighbours. A head's channels of keys stand in an order in which, on the calibration
    text, that costs the logits little (`calibrate/observers/channel_orders.py`). The graph brings keys and
    queries in that order (`passes/cache/order_channels.py`), which leaves their products as they were. A
    token is packed by itself, so that none need wait for others.

    Options: `key_bits` and `value_bits` where they differ from `bits`: 3, 4, 6 or 8, the sign among them;
    `block`; `order`, the parts of a token whose channels are put in order: `keys`, `values`, `both`, or
    `none`; `tokens`, how many are packed at a time; `sinks` and `residual`, the first and the newest tokens,
    which stay as they are; `slack`, how many more may gather before the oldest are packed; `prefill`, `exact`
    (attend to the prompt in full precision, then pack it) or `streaming` (pack after every chunk).

    Measured on SmolLM2-135M-Instruct, in onnxruntime, recall behind 1,000 and 4,000 tokens: 0.68 and 0.60 by
    the defaults, at a KL of 0.013 and 22 and 16 % of the bytes, against 0.70 and 0.65 of the whole cache;
    0.60 and 0.60 and a KL of 0.018 with channels as they are. `kivi` in 2 bits, at 31 and 15 %, has a KL of
    0.088; `turboquant` in 3 bits, with its newest tokens whole, 0.0055 at 35 and 17 %.

    Differs from the paper: it sorts channels by the norms of the rows of the keys' projection (K-sort); here
    blocks are searched for, by the sizes of queries and keys on a text. It permutes both projections when a
    model is compiled; here new queries and keys are permuted, behind their rotary embedding, whose pairs of
    channels need not stay together so. A block's exponent is the one of two with the least squared error, not
    the largest number's own. Values are packed as keys are, where the paper is about keys. The first tokens
    stay whole.
    """

    key_bits: int = later()
    value_bits: int = later()
    block: int = 16
    order: str = "keys"
    tokens: int = 16
    residual: int = 0
    bits: int = option(4)

    name = method = "abq"

    def __post_init__(self) -> None:
        settle_bits(self, MANTISSAS)
        self.check_waiting()
        if self.tokens < 1 or self.block < 1:
            raise IRError(
                f"{self.name}: 1 or more tokens are packed together, in blocks of 1 or more channels, not "
                f"{self.tokens} and {self.block}"
            )
        if self.order not in CHOSEN:
            raise IRError(
                f"{self.name}: order is one of {', '.join(CHOSEN)}, not {self.order[:40]!r}"
            )

    @property
    def ordered(self) -> tuple[str, ...]:
        return CHOSEN[self.order]

    @property
    def together(self) -> int:
        return self.block

    @property
    def granule(self) -> int:
        return self.tokens

    @property
    def in_arrays(self) -> bool:
        return True

    @property
    def integral(self) -> bool:
        return self.key_bits == self.value_bits == 4 and self.block % 2 == 0

    def granules(self, tokens: Size) -> Size:
        found = super().granules(tokens)
        return divided_up(found, GRANULES) * GRANULES if self.integral else found

    def blocks(self, shape: GroupShape) -> int:
        return shape.key_size // self.block

    def check(self, shape: GroupShape) -> None:
        super().check(shape)
        for part in ("key", "value"):
            what = f"{part} size of a head,"
            check_divides(self.name, "block", self.block, what, shape.size(part))

    def pieces(self, shape: GroupShape) -> Iterator[Piece]:
        for part, bits in self.parts:
            yield from codes_by_token(part, bits, self.tokens, shape.size(part))
            yield Piece(f"{part}_exponent", self.tokens, shape.size(part) // self.block, "u8")

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Parts of a token, and the bits of their mantissas."""
        return ("key", self.key_bits), ("value", self.value_bits)
