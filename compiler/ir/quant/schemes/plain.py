"""Floats: weights as they come, and in half of their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..scheme import PRESETS, SCHEMES, Piece, Preset, Scheme

if TYPE_CHECKING:
    from torch import Tensor


@SCHEMES.register
@dataclass(frozen=True)
class Half(Scheme):
    """Float16 as a storage format: half the bytes on disk, the same float32 arithmetic.

    half float16 [.., N, M]. What float16 has no room for becomes infinite.
    """

    name = "half"
    nearly_exact = True
    operators = {}  # noqa: RUF012

    def describe(self) -> str:
        return "stored in float16"

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        return {"half": (shape, "f16")}

    def nearest(self, groups_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        return groups_RGB.half()

    def values(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        return codes_RGB.float()

    def pack(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"half": codes_RGB[:, 0]}

    def dequantize(self, pieces: Mapping[str, Tensor], width: int) -> Tensor:
        return pieces["half"].float()

    def widened(self, editor: Any, pieces: Mapping[str, Any], shape: tuple[int, ...]) -> Any:
        import torch

        return editor.call(torch.ops.aten._to_copy.default, pieces["half"], dtype=torch.float32)


PRESETS.register(Preset("fp32", None, 1e-4))  # sums are taken in another order
PRESETS.register(Preset("fp16", Half(), 0.02))  # an estimate
