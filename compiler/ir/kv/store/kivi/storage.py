"""KIVI: keys quantized per channel, values per token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ......errors import IRError
from ..packed import CODES, Packed, Piece, by_channel, by_token, check_bits, check_divides
from ..storage import GroupShape


@dataclass(frozen=True)
class Kivi(Packed):
    """Asymmetric codes with a float16 scale and zero (Liu et al. 2024, sections 3.2 and 3.3).

    Keys share a scale over `group` tokens of a channel, values over `group` channels of a token. With
    `keys=token` keys are quantized as values are, which the paper found to be worse.
    """

    key_bits: int = 4
    value_bits: int = 4
    group: int = 32
    keys: str = "channel"

    name = "kivi"

    def __post_init__(self) -> None:
        self.check_waiting()
        check_bits(self.name, self.key_bits, self.value_bits)
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
