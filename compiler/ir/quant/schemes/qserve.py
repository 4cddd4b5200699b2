"""QServe's progressive groups: codes of 4 bits whose scales are integers, so that weights are int8 ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .....errors import IRError
from ..scheme import PRESETS, SCHEMES, Piece, Preset, Scheme, check_block

if TYPE_CHECKING:
    from torch import Tensor

#: The int8 number that the largest weight of a row is: rounding to codes whose step is 16 at most then leaves
#: the range of int8 nowhere.
PROTECTED = 119

#: The largest code, and the largest int8 that a code may stand for.
TOP, LARGEST = 15, 127


@SCHEMES.register
@dataclass(frozen=True)
class QServe(Scheme):
    """w = u i with a scale u for a row and i an int8 number; i = (q - z) s in groups of `block`.

    packed  u8   [.., N, G, block / 2]     q, 0 to 15, low bits first
    scales  u8   [.., N, G]                s, an integer from 1 on
    zeros   u8   [.., N, ceil(G / 2)]      z, 0 to 15
    units   f32  [.., N]                   u = max |w| / 119

    Codes become int8 by two operations of integers, and a product with activations in 8 bits is one of
    integers, with one number of each row and each token behind it: W4A8. At block 128 that is 4.10 bits a
    weight.

    Source: QoQ (Lin et al. 2024, "QServe", section 4.1, progressive group quantization, with its protective
    range). Different: weights are rounded once, to the nearest of the levels that both steps leave, where the
    paper rounds to int8 and those again; u is float32, not float16; what its QoQ does ahead (rotated inputs,
    smoothed outputs, reordered channels, searched clipping) is left to solvers: `gptq` scales channels and
    fits ranges.
    """

    block: int = 128

    name = "qserve"
    activations = "int8"

    def __post_init__(self) -> None:
        check_block(self.block)
        if not self.block:
            raise IRError("the block must be that of groups within a row, such as 128, not 0")

    @property
    def integer_rows(self) -> bool:
        return True

    def describe(self) -> str:
        return f"4 bits, block {self.block}, under integer scales and one float a row"

    @property
    def fewest_rows(self) -> int:
        return 4 * self.block

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        lead, groups = shape[:-1], math.ceil(shape[-1] / self.block)
        return {
            "packed": ((*lead, groups, self.block // 2), "u8"),
            "scales": ((*lead, groups), "u8"),
            "zeros": ((*lead, math.ceil(groups / 2)), "u8"),
            "units": (lead, "f32"),
        }

    def groups(self, rows_RM: Tensor) -> Tensor:
        from ..pack import in_blocks

        return in_blocks(rows_RM, self.block)

    def grid(self, groups_RGB: Tensor) -> dict[str, Tensor]:
        import torch

        units = groups_RGB.abs().amax((1, 2), keepdim=True) / PROTECTED
        units = torch.where(units == 0, 1.0, units)
        low = groups_RGB.amin(-1, keepdim=True).clamp(max=0)
        high = groups_RGB.amax(-1, keepdim=True).clamp(min=0)
        grid = self.settle({"scales": (high - low) / TOP, "units": units})
        return {**grid, "zeros": (-low / grid["scales"]).round().clamp(0, TOP)}

    def settle(self, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**grid, "scales": self._integers(grid) * grid["units"]}

    def _integers(self, grid: Mapping[str, Tensor]) -> Tensor:
        """The integers s [R, G, 1] of a grid's scales."""
        return (grid["scales"] / grid["units"]).round().clamp(1, LARGEST)

    def nearest(self, groups_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        zeros, reach = grid["zeros"], (LARGEST / self._integers(grid)).floor()
        codes = (groups_RGB / grid["scales"]).add_(zeros).round_()
        return codes.clamp((zeros - reach).clamp(min=0), (zeros + reach).clamp(max=TOP))

    def values(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        return (codes_RGB - grid["zeros"]) * self._integers(grid) * grid["units"]

    def pack(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from ..pack import pack_bits

        return {
            "packed": pack_bits(codes_RGB, 4),
            "scales": self._integers(grid).squeeze(-1).byte(),
            "zeros": pack_bits(grid["zeros"].squeeze(-1), 4),
            "units": grid["units"].flatten(),
        }

    def dequantize(self, pieces: Mapping[str, Tensor], width: int) -> Tensor:
        from ..pack import unpack_bits

        scales = pieces["scales"].float()[..., None]
        codes = unpack_bits(pieces["packed"], 4, self.block).float()
        zeros = unpack_bits(pieces["zeros"], 4, scales.shape[-2]).float()
        integers = ((codes - zeros[..., None]) * scales).flatten(-2)[..., :width]
        return integers * pieces["units"][..., None]


PRESETS.register(Preset("qserve", QServe(), 1.0))  # as int4
