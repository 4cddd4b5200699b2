"""Codes of 2, 3, 4 or 8 bits in bytes, without a bit of waste.

A code is cut into planes of 1, 2, 4 or 8 bits (`ir/kv/store/packed`). A plane's byte j holds the codes
j * n .. j * n + n - 1, the first in its lowest bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..store.packed import PLANES


def pack(codes: Tensor, bits: int) -> list[Tensor]:
    """Packs the last axis, a multiple of 8: codes [.., n] below 2**bits to a plane of bytes for each width,
    u8 [.., n * width / 8]."""
    packed = []
    for width, above in PLANES[bits]:
        plane = (codes.to(torch.int32) >> above) & (2**width - 1)
        parts = plane.unflatten(-1, (-1, 8 // width)) << _shifts(width, codes, torch.int32)
        packed.append(parts.sum(-1).to(torch.uint8))
    return packed


def unpack(packed: Sequence[Tensor], bits: int) -> Tensor:
    """What `pack` was given, as u8."""
    codes = torch.zeros((), dtype=torch.uint8, device=packed[0].device)
    for plane, (width, above) in zip(packed, PLANES[bits], strict=True):
        parts = plane[..., None] >> _shifts(width, plane, torch.uint8)
        codes = codes | ((parts & (2**width - 1)) << above).flatten(-2)
    return codes


def _shifts(width: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    return width * torch.arange(8 // width, device=like.device, dtype=dtype)
