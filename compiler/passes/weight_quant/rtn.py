"""Round-to-nearest group-wise quantization: the mathematics, without the graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ...ir.ops.quantized import dequantize, pack_bits


def quantize_rtn(
    weight: Tensor, bits: int, block: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantizes each group of `block` weights along the last axis to the nearest of 2^bits levels.

    Symmetric: scale = the weight of largest magnitude, with its sign, over -2^(bits-1), so that it is
    met exactly and the level range is used in full; zero point 2^(bits-1), not stored. Asymmetric:
    levels spread over [min(w, 0), max(w, 0)], zero point rounded to a level.

    `weight` is [..., M]. Gives (packed [..., G, block*bits/8] uint8, scales [..., G] float32,
    zeros [..., ceil(G*bits/8)] uint8 or None).
    """
    groups = functional.pad(weight.float(), (0, -weight.shape[-1] % block)).unflatten(
        -1, (-1, block)
    )
    top = (1 << bits) - 1
    middle = 1 << (bits - 1)
    if symmetric:
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scales = largest / -middle
        zeros = torch.full_like(scales, middle)
    else:
        low = groups.amin(-1, keepdim=True).clamp(max=0)
        high = groups.amax(-1, keepdim=True).clamp(min=0)
        scales = (high - low) / top
        zeros = torch.where(scales == 0, 0, (-low / scales).round()).clamp(0, top)
    scales = torch.where(scales == 0, 1.0, scales)
    codes = (groups / scales + zeros).round_().clamp_(0, top)
    packed_zeros = None if symmetric else pack_bits(zeros.squeeze(-1), bits)
    return pack_bits(codes, bits), scales.squeeze(-1), packed_zeros


def relative_error(
    weight: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: int
) -> float:
    """|w - dequantized|_F / |w|_F."""
    restored = dequantize(packed, scales, zeros, bits, block, weight.shape[-1])
    return float((restored - weight).norm() / weight.norm().clamp(min=1e-30))
