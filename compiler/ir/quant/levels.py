"""What schemes share whose codes stand for a few levels that are not evenly spaced, times a scale a group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from .scheme import Piece, Scheme

if TYPE_CHECKING:
    from torch import Tensor

#: What a group of whole rows is padded to, so that runtimes can take it for several shorter ones.
_WHOLE = 32


def float_levels(exponent: int, mantissa: int) -> tuple[float, ...]:
    """What floats with so many bits stand for, by their code: sign, exponent, mantissa; no infinity, no NaN.

    The exponent is biased by 2^(exponent - 1) - 1, and 0 is that of numbers below the smallest normal one
    (OCP Microscaling Formats v1.0, section 5.3).
    """
    bias, found = (1 << (exponent - 1)) - 1, []
    for code in range(1 << (exponent + mantissa)):
        power, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
        significand = fraction / (1 << mantissa) + (power > 0)
        found.append(math.ldexp(significand, max(power, 1) - bias))
    return (*found, *(-level for level in found))


class Levels(Scheme):
    """Base of schemes over levels: level * scale, a scale for `block` weights of a row.

    packed uint8 [.., N, G, block * bits / 8], low bits first, and the pieces of scales. A subclass says which
    levels there are and how scales are stored; a block of 0 is a whole row, padded to a multiple of 32.
    """

    block: Any
    """A field, or a fact of the format."""

    levels: ClassVar[tuple[float, ...]]
    """Levels by their code; where two are equal, the smaller code is used."""

    @property
    def bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    @property
    def fewest_rows(self) -> int:
        return 4 * (self.block or _WHOLE)

    def block_of(self, width: int) -> int:
        """Weights of a row of some width that share a scale."""
        return int(self.block or _WHOLE * math.ceil(width / _WHOLE))

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        lead, block = shape[:-1], self.block_of(shape[-1])
        groups = math.ceil(shape[-1] / block)
        return {
            "packed": ((*lead, groups, block * self.bits // 8), "u8"),
            "scales": ((*lead, groups), "f32"),
        }

    def groups(self, rows_RM: Tensor) -> Tensor:
        from .pack import in_blocks

        return in_blocks(rows_RM, self.block_of(rows_RM.shape[-1]))

    def grid(self, groups_RGB: Tensor) -> dict[str, Tensor]:
        """The weight of largest magnitude is met by the largest level."""
        import torch

        scales = groups_RGB.abs().amax(-1, keepdim=True) / max(self.levels)
        return {"scales": torch.where(scales == 0, 1.0, scales)}

    def nearest(self, groups_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        import torch

        ordered = sorted(
            {level: code for code, level in reversed([*enumerate(self.levels)])}.items()
        )
        levels = torch.tensor([level for level, _ in ordered], device=groups_RGB.device)
        codes = torch.tensor([code for _, code in ordered], dtype=torch.uint8, device=levels.device)
        between = (levels[1:] + levels[:-1]) / 2
        scaled = (groups_RGB / grid["scales"]).contiguous()
        return codes[torch.bucketize(scaled, between, out_int32=True)]

    def values(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        return self._of_codes(codes_RGB) * grid["scales"]

    def _of_codes(self, codes: Tensor) -> Tensor:
        import torch

        return torch.tensor(self.levels, device=codes.device)[codes.int()]

    def pack(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**self.pack_codes(codes_RGB), **self.pack_scales(grid)}

    def pack_codes(self, codes_RGB: Tensor) -> dict[str, Tensor]:
        """The pieces of codes."""
        from .pack import pack_bits

        return {"packed": pack_bits(codes_RGB, self.bits)}

    def unpack_codes(self, pieces: Mapping[str, Tensor], block: int) -> Tensor:
        """The inverse: [.., N, G, block]."""
        from .pack import unpack_bits

        return unpack_bits(pieces["packed"], self.bits, block)

    def pack_scales(self, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pieces of a settled grid's scales."""
        return {"scales": grid["scales"].squeeze(-1)}

    def unpack_scales(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """The inverse: float32 [.., N, G]."""
        return pieces["scales"]

    def dequantize(self, pieces: Mapping[str, Tensor], width: int) -> Tensor:
        codes = self.unpack_codes(pieces, self.block_of(width))
        wide = self._of_codes(codes) * self.unpack_scales(pieces)[..., None]
        return wide.flatten(-2)[..., :width]
