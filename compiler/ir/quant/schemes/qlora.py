"""QLoRA's 4-bit types: nf4 and fp4, with the largest magnitude of a block as its scale.

Source: QLoRA (Dettmers et al. 2023, section 3 and appendix E) for nf4; the tables and codes are those of
bitsandbytes. Its double quantization of scales is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..levels import Levels
from ..scheme import PRESETS, SCHEMES, Preset, check_block

#: Between quantiles of a normal distribution, asymmetric so that zero is met.
_NORMAL = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

#: Two bits of exponent and one of mantissa over 12; below 2 / 12 there is one level, not halfway to zero.
_FLOAT = tuple(level / 12 for level in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))


class _Absmax(Levels):
    """packed uint8 [.., N, G, block / 2], low nibble first; scales float32 [.., N, G]."""

    def __post_init__(self) -> None:
        check_block(self.block)

    def describe(self) -> str:
        return f"{self.name}, {f'block {self.block}' if self.block else 'a scale a row'}"


@SCHEMES.register
@dataclass(frozen=True)
class NF4(_Absmax):
    """Levels as dense as normally distributed weights are."""

    block: int = 64

    name = "nf4"
    levels = _NORMAL


@SCHEMES.register
@dataclass(frozen=True)
class FP4(_Absmax):
    """Levels of a float with 4 bits, scaled to 1."""

    block: int = 64

    name = "fp4"
    levels = (*_FLOAT, *(-level for level in _FLOAT))


PRESETS.register(Preset("nf4", NF4(), 1.0))  # int4's
PRESETS.register(
    Preset("fp4", FP4(), 1.2)
)  # an estimate: levels are coarser where weights are many
