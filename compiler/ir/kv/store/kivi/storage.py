"""KIVI: keys quantized per channel, values per token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ......errors import IRError
from ....options import later, option
from ..packed import CHOSEN, CODES, Packed, by_channel, by_token, check_divides, settle_bits
from ..storage import STORAGES, GroupShape, Piece


@STORAGES.register
@dataclass(frozen=True)
class Kivi(Packed):
    """Packs older tokens into `bits` bits a number (Liu et al. 2024, section 3.3).

    Before: `cache 0.0 heads=0,1 .. policy=full storage=f32`
    After:  `cache 0.0 heads=0,1 .. policy=full storage=kivi(..,key_bits=2,value_bits=2,group=32,..)`

    Options: `key_bits` and `value_bits` where they differ from `bits`; `group`, tokens of a channel (keys) or
    channels of a token (values) that share a scale; `sinks` and `residual`, the first and the newest tokens,
    which stay as they are; `slack`, how many more may gather before the oldest are packed; `keys`, `channel`
    or `token`; `prefill`, `exact` (attend to the prompt in full precision, then pack it) or `streaming` (pack
    after every chunk); `rotate`, `keys`, `values` or `both`, which the graph multiplies by a Hadamard matrix
    over each head's channels before they become codes, and queries and outputs to match (QuaRot, Ashkboos et
    al. 2024), or `none`.

    Measured on SmolLM2-135M-Instruct, recall behind 1,000 and 4,000 tokens: 0.70 and 0.65 with 4 bits, as of
    the whole cache, at a KL of 0.0011, and 0.25 and 0.15 with the paper's 2 bits, at 0.088. Where the first
    tokens are packed too (`sinks=0`, as in the paper), the KL is 0.0028 and 0.14, and `rotate=both` halves
    that of 2 bits.

    Differs from the paper: group 32 and residual 128 are its figures, but here the newest 128 tokens are
    always whole, where the paper lets the keys' residual fall to nothing each time it is packed. Scale and
    zero are rounded outwards to float16. Groups that keep few tokens, and layers with a sliding window of
    their own, stay as they are.
    """

    key_bits: int = later()
    value_bits: int = later()
    group: int = 32
    keys: str = "channel"
    rotate: str = "none"
    bits: int = option(2)

    name = method = "kivi"

    def __post_init__(self) -> None:
        settle_bits(self)
        self.check_waiting()
        if self.group < 1 or self.group % CODES:
            raise IRError(
                f"{self.name}: a group is a positive multiple of {CODES}, not {self.group}"
            )
        if self.residual < self.group:
            raise IRError(
                f"{self.name}: a residual of {self.residual} tokens is smaller than a group of "
                f"{self.group}; keep at least a group as it is"
            )
        if self.keys not in ("channel", "token"):
            raise IRError(f"{self.name}: keys have scales by channel or token, not {self.keys!r}")
        if self.rotate not in CHOSEN:
            raise IRError(f"{self.name}: rotate is one of {', '.join(CHOSEN)}, not {self.rotate!r}")

    @property
    def rotated(self) -> tuple[str, ...]:
        return CHOSEN[self.rotate]

    @property
    def granule(self) -> int:
        return self.group

    def check(self, shape: GroupShape) -> None:
        super().check(shape)
        check_divides(self.name, "group", self.group, "value size of a head,", shape.value_size)
        if self.keys == "token":
            check_divides(self.name, "group", self.group, "key size of a head,", shape.key_size)

    def pieces(self, shape: GroupShape) -> Iterator[Piece]:
        quantized = by_channel if self.keys == "channel" else by_token
        tokens, group = self.granule, self.group
        yield from quantized("key", self.key_bits, tokens, group, shape.key_size)
        yield from by_token("value", self.value_bits, tokens, group, shape.value_size)
