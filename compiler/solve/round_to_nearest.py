"""Round-to-nearest group-wise quantization: the mathematics, without the graph."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..ir.quant.pack import dequantize, pack_bits

#: Numbers that are rounded at a time: bounds the memory of intermediates at a few tens of megabytes.
_SLAB = 1 << 21


@dataclass(frozen=True)
class Rounded:
    """A weight [..., M] in packed form, and |w - restored|_F / |w|_F.

    packed uint8 [..., G, block*bits/8], scales float32 [..., G], zeros uint8 [..., ceil(G*bits/8)] or None.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    error: float


def quantize_rtn(weight: Tensor, bits: int, block: int, symmetric: bool) -> Rounded:
    """Rounds each group of `block` weights along the last axis to the nearest of 2^bits levels.

    Symmetric: scale = the weight of largest magnitude, with its sign, over -2^(bits-1), so that it is
    met exactly and the level range is used in full; zero point 2^(bits-1), not stored. Asymmetric:
    levels spread over [min(w, 0), max(w, 0)], zero point rounded to a level. Works on a few rows at a
    time, in float32.
    """
    lead, width = weight.shape[:-1], weight.shape[-1]
    rows = weight.reshape(-1, width)
    parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
    missed = total = 0.0
    for slab in rows.split(max(1, _SLAB // width)):
        values = slab.float()
        packed, scales, zeros = _round_rows(values, bits, block, symmetric)
        restored = dequantize(packed, scales, zeros, bits, block, width)
        missed += float((restored - values).square().sum(dtype=torch.float64))
        total += float(values.square().sum(dtype=torch.float64))
        parts.append((packed, scales, zeros))
    packed, scales = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    points = [part[2] for part in parts]
    joined = None if symmetric else torch.cat([point for point in points if point is not None])
    return Rounded(
        packed.reshape(*lead, *packed.shape[1:]),
        scales.reshape(*lead, -1),
        None if joined is None else joined.reshape(*lead, -1),
        math.sqrt(missed / total) if total else 0.0,
    )


def _round_rows(
    values: Tensor, bits: int, block: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    groups = functional.pad(values, (0, -values.shape[-1] % block)).unflatten(-1, (-1, block))
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if symmetric:
        scales = torch.where(high > -low, high, low) / -middle
        zeros = torch.full_like(scales, middle)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales = (high - low) / top
        zeros = torch.where(scales == 0, 0, (-low / scales).round()).clamp(0, top)
    scales = torch.where(scales == 0, 1.0, scales)
    codes = (groups / scales).add_(zeros).round_().clamp_(0, top)
    packed_zeros = None if symmetric else pack_bits(zeros.squeeze(-1), bits)
    return pack_bits(codes, bits), scales.squeeze(-1), packed_zeros
