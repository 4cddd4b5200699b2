"""Floats in 8 and 6 bits with a scale for a row, or for a block: fp8 and fp6."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from .....errors import IRError
from ..levels import Levels, float_levels
from ..scheme import PRESETS, SCHEMES, Piece, Preset, check_block

if TYPE_CHECKING:
    from torch import Tensor

_levels = lru_cache(float_levels)


def _described(scheme: Levels, kind: str) -> str:
    return f"{kind}, {f'block {scheme.block}' if scheme.block else 'a scale a row'}"


@SCHEMES.register
@dataclass(frozen=True)
class FP8(Levels):
    """E4M3. packed uint8 [.., N, G, block]; scales float32 [.., N, G].

    Source: FP8 Formats for Deep Learning (Micikevicius et al. 2022, section 3). The codes of NaN are not
    written, and read as the largest level.
    """

    block: int = 0

    name = "fp8"
    levels = tuple(min(max(level, -448.0), 448.0) for level in float_levels(4, 3))

    def __post_init__(self) -> None:
        check_block(self.block)

    def describe(self) -> str:
        return _described(self, "fp8 (E4M3)")


@SCHEMES.register
@dataclass(frozen=True)
class FP6(Levels):
    """E2M3, or with 2 bits of mantissa E3M2, in the 4+2 split: the high four bits of each code in one plane,
    the low two in another, so that every byte holds whole parts.

    packed uint8 [.., N, G, block / 2] and low [.., N, G, block / 4], low bits first; scales float32
    [.., N, G].

    Source: ZeroQuant(4+2) (Wu et al. 2023, sections 3 and 4); the paper has E3M2. On normally distributed
    rows of 896 E2M3 is off by less than half as much.
    """

    mantissa: int = 3
    block: int = 0

    name = "fp6"
    high_bits, low_bits = 4, 2

    def __post_init__(self) -> None:
        if self.mantissa not in (2, 3):
            raise IRError(f"floats of 6 bits have 2 or 3 bits of mantissa, not {self.mantissa}")
        check_block(self.block)

    @property
    def levels(self) -> tuple[float, ...]:  # type: ignore[override]
        return _levels(5 - self.mantissa, self.mantissa)

    def describe(self) -> str:
        return _described(self, f"fp6 (E{5 - self.mantissa}M{self.mantissa})")

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        (*lead, groups), _ = super().pieces(shape)["scales"]
        block = self.block_of(shape[-1])
        return {
            "packed": ((*lead, groups, block // 2), "u8"),
            "low": ((*lead, groups, block // 4), "u8"),
            "scales": ((*lead, groups), "f32"),
        }

    def pack_codes(self, codes_RGB: Tensor) -> dict[str, Tensor]:
        from ..pack import pack_planes

        return pack_planes(codes_RGB, self.high_bits, self.low_bits, ("packed", "low"))

    def unpack_codes(self, pieces: Mapping[str, Tensor], block: int) -> Tensor:
        from ..pack import unpack_planes

        planes = (self.high_bits, self.low_bits)
        return unpack_planes(pieces["packed"], pieces["low"], *planes, block)


PRESETS.register(Preset("fp8", FP8(), 0.4))  # estimates, from int8's and int6's
PRESETS.register(Preset("fp6", FP6(), 0.5))
