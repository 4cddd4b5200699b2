"""Asymmetric quantization of groups: x is about zero + code * scale, with float16 scale and zero.

Scale and zero are rounded outwards, so every number of a group lies between zero and zero + (2**bits - 1) *
scale as they are stored, and the error is at most scale / 2 (but for float32's own rounding).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The largest magnitude that is stored; what is larger is cut, since float16 has no room for it.
LARGEST = 30000.0


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (u8, shaped as x), scale and zero (f16, [.., 1]) of groups along the last axis."""
    x = x.float().clamp(-LARGEST, LARGEST)
    most = 2**bits - 1
    zero = _down(x.amin(-1, keepdim=True))
    scale = -_down(-(x.amax(-1, keepdim=True) - zero.float()) / most)
    steps = (x - zero.float()) / scale.float().clamp(min=torch.finfo(torch.float16).tiny * 2**-10)
    return steps.round().clamp(0, most).to(torch.uint8), scale, zero


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The numbers that codes stand for, f32; scale and zero are broadcast."""
    return codes.float() * scale.float() + zero.float()


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype; what is larger than its largest number is cut to that, where a cast gives infinity."""
    if x.dtype == dtype:
        return x
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def _down(x: Tensor) -> Tensor:
    """The largest float16 that is no larger than x."""
    near = x.half()
    bits = near.view(torch.int16)
    # One step down: towards 0 for positive numbers, away from it for the others; from 0 it is -tiny.
    below = torch.where(near > 0, bits - 1, torch.where(near < 0, bits + 1, -(2**15) + 1))
    return torch.where(near.float() > x, below.to(torch.int16).view(torch.float16), near)
