"""ternary: -s, 0 or s in two bits, s the mean magnitude (BitNet b1.58's format)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..scheme import PRESETS, SCHEMES, Piece, Preset, Scheme, check_block

if TYPE_CHECKING:
    from torch import Tensor

#: Weights that lie together in `packed`, whatever shares a scale: rows are padded to whole ones.
LINE = 32


@SCHEMES.register
@dataclass(frozen=True)
class Ternary(Scheme):
    """w = (q - 2) * s with q in 1 .. 3, one s for `block` weights of a row, or with block 0 for the weight.

    packed uint8 [.., N, G, block / 4], low bits first, with a block of 32 where there is one scale: byte for
    byte codes of 2 bits with the zero point in the middle, as integer kernels read them. The fourth level is
    not used: 1.58 bits take 2. scales float32 [.., N, G], or `scale` [1].

    Source: The Era of 1-bit LLMs (Ma et al. 2024, section 2). A model that was not trained for it does not
    survive.
    """

    block: int = 0

    name = "ternary"

    def __post_init__(self) -> None:
        check_block(self.block, LINE, "one scale")

    @property
    def shared(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.block else frozenset({"scale"})

    def describe(self) -> str:
        return f"ternary, {f'block {self.block}' if self.block else 'one scale'}"

    @property
    def fewest_rows(self) -> int:
        return 4 * (self.block or LINE)

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        lead, block = shape[:-1], self.block or LINE
        groups = math.ceil(shape[-1] / block)
        scale: dict[str, Piece] = {"scale": ((1,), "f32")}
        if self.block:
            scale = {"scales": ((*lead, groups), "f32")}
        return {"packed": ((*lead, groups, block // 4), "u8"), **scale}

    def groups(self, rows_RM: Tensor) -> Tensor:
        from ..pack import in_blocks

        return in_blocks(rows_RM, self.block or LINE)

    def grid(self, groups_RGB: Tensor) -> dict[str, Tensor]:
        """The mean over what is not zero: padding is not counted."""
        import torch

        dims = (-1,) if self.block else (0, 1, 2)
        count = (groups_RGB != 0).sum(dims, keepdim=True)
        mean = (groups_RGB.abs() / count.clamp(min=1)).sum(dims, keepdim=True)
        return {"scales": torch.where(count == 0, 1.0, mean)}

    def nearest(self, groups_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        return (groups_RGB / grid["scales"]).round_().clamp_(-1, 1).add_(2)

    def values(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        return (codes_RGB - 2) * grid["scales"]

    def pack(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from ..pack import pack_bits

        scales = grid["scales"]
        named = {"scales": scales.squeeze(-1)} if self.block else {"scale": scales.reshape(1)}
        return {"packed": pack_bits(codes_RGB, 2), **named}

    def dequantize(self, pieces: Mapping[str, Tensor], width: int) -> Tensor:
        from ..pack import unpack_bits

        codes = unpack_bits(pieces["packed"], 2, self.block or LINE).float()
        scales = pieces["scales"][..., None] if self.block else pieces["scale"]
        return ((codes - 2) * scales).flatten(-2)[..., :width]


PRESETS.register(Preset("ternary", Ternary(), float("inf")))
