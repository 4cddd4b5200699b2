"""4-bit floats in short blocks under scales that are short floats themselves: mxfp4 and nvfp4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..levels import Levels, float_levels
from ..scheme import PRESETS, SCHEMES, Piece, Preset

if TYPE_CHECKING:
    from torch import Tensor

#: Powers of two by their E8M0 code; the last code is that of NaN.
POWERS = (*(math.ldexp(1.0, code - 127) for code in range(255)), math.nan)

#: Powers whose products with every level float32 has.
_LOWEST, _HIGHEST = -126, 125

#: By their E4M3 code; the last code of each sign is that of NaN.
E4M3 = tuple(
    math.nan if code & 127 == 127 else level for code, level in enumerate(float_levels(4, 3))
)
_LARGEST, _SMALLEST = 448.0, 2.0**-9


@SCHEMES.register
@dataclass(frozen=True)
class MXFP4(Levels):
    """E2M1 under a power of two for 32 weights.

    packed uint8 [.., N, G, 16], low nibble first; scales uint8 [.., N, G], E8M0: 2^(code - 127). The scale is
    the largest power of two in the largest magnitude, over that in the largest level; what lies between the
    largest level and the next power is cut to it.

    Source: OCP Microscaling Formats (MX) v1.0, sections 5.2 and 6.3. Here no scale stands for NaN, and those
    below 2^-126 and above 2^125 are left out.
    """

    name = "mxfp4"
    levels = float_levels(2, 1)
    block = 32

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        found = super().pieces(shape)
        return found | {"scales": (found["scales"][0], "u8")}

    def grid(self, groups_RGB: Tensor) -> dict[str, Tensor]:
        import torch

        largest = groups_RGB.abs().amax(-1, keepdim=True)
        power = torch.where(largest == 0, 0, torch.frexp(largest).exponent - 1 - 2)
        return {"scales": _power_of_two(power)}

    def settle(self, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The power of two whose logarithm is nearest."""
        import torch

        found = torch.frexp(grid["scales"].abs())
        return {"scales": _power_of_two(found.exponent - (found.mantissa < math.sqrt(0.5)).int())}

    def pack_scales(self, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        code = torch.frexp(grid["scales"].squeeze(-1)).exponent - 1 + 127
        return {"scales": code.to(torch.uint8)}

    def unpack_scales(self, pieces: Mapping[str, Tensor]) -> Tensor:
        import torch

        scales = pieces["scales"]
        return torch.tensor(POWERS, device=scales.device)[scales.int()]


def _power_of_two(power: Tensor) -> Tensor:
    import torch

    power = power.clamp(_LOWEST, _HIGHEST)
    return torch.ldexp(torch.ones_like(power, dtype=torch.float32), power)


@SCHEMES.register
@dataclass(frozen=True)
class NVFP4(Levels):
    """E2M1 under an E4M3 scale for 16 weights, and a float32 scale for all of the weight.

    packed uint8 [.., N, G, 8], low nibble first; scales uint8 [.., N, G], E4M3; scale float32 [1], such that
    the largest magnitude of the weight has the largest scale and level, 448 * 6.

    Source: NVIDIA, Pretraining Large Language Models with NVFP4 (2025, section 2 and appendix B).
    """

    name = "nvfp4"
    shared = frozenset({"scale"})
    levels = float_levels(2, 1)
    block = 16

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        found = super().pieces(shape)
        return found | {"scales": (found["scales"][0], "u8"), "scale": ((1,), "f32")}

    def grid(self, groups_RGB: Tensor) -> dict[str, Tensor]:
        import torch

        scales = groups_RGB.abs().amax(-1, keepdim=True) / max(self.levels)
        largest = scales.amax().reshape(1, 1, 1)
        whole = torch.where(largest == 0, 1.0, (largest / _LARGEST).clamp(min=2.0**-100))
        return {"scales": scales, "scale": whole}

    def settle(self, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        share = self._shares(grid).float()
        return {"scales": share * grid["scale"], "scale": grid["scale"]}

    @staticmethod
    def _shares(grid: Mapping[str, Tensor]) -> Tensor:
        """Scales over that of the whole weight, in E4M3, none of them zero."""
        import torch

        share = (grid["scales"] / grid["scale"]).clamp(_SMALLEST, _LARGEST)
        return share.to(torch.float8_e4m3fn)

    def pack_scales(self, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        codes = self._shares(grid).view(torch.uint8).squeeze(-1)
        return {"scales": codes, "scale": grid["scale"].reshape(1)}

    def unpack_scales(self, pieces: Mapping[str, Tensor]) -> Tensor:
        import torch

        scales = pieces["scales"]
        return torch.tensor(E4M3, device=scales.device)[scales.int()] * pieces["scale"]


PRESETS.register(Preset("mxfp4", MXFP4(), 1.2))  # estimates, from int4's
PRESETS.register(Preset("nvfp4", NVFP4(), 1.0))
