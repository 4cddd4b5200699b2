"""Group-wise quantized weights in torch: packing, and what the packed form stands for.

A weight [N, M] is cut along M into G = ceil(M / block) groups. With `bits` b (2, 4 or 8) a value is
    w = (q - z) * s,      q in 0 .. 2^b - 1,
s one scale and z one zero point a group; without zero points z = 2^(b-1).
    packed  uint8   [N, G, block * b / 8]     low bits first; a short last group is padded with z
    scales  float   [N, G]
    zeros   uint8   [N, ceil(G * b / 8)]      packed in the same way, or None
This is byte for byte what onnxruntime's MatMulNBits reads, and, seen as [N, M], what ONNX's
DequantizeLinear with `block_size` reads, so weights go to a file as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Packs integers 0..2^bits-1 of the last axis into uint8, low bits first, padding with zeros."""
    per_byte = 8 // bits
    pad = -values.shape[-1] % per_byte
    parts = functional.pad(values.to(torch.uint8), (0, pad)).unflatten(-1, (-1, per_byte))
    packed: Tensor = parts[..., 0].clone()
    for index in range(1, per_byte):
        packed |= parts[..., index] << (bits * index)
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`; `count` is the length of the last axis before packing."""
    if bits == 8:
        return packed[..., :count]
    # Masked first: what torch's ONNX exporter makes of the shift is signed.
    places = range(0, 8, bits)
    parts = [(packed & (((1 << bits) - 1) << place)) >> place for place in places]
    return torch.stack(parts, dim=-1).flatten(-2)[..., :count]


def dequantize(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: int, width: int
) -> Tensor:
    """The weight [..., N, width] that the packed form stands for, in the dtype of `scales`."""
    groups = scales.shape[-1]
    codes = unpack_bits(packed, bits, block).to(scales.dtype)
    if zeros is None:
        offset: Tensor | float = float(1 << (bits - 1))
    else:
        offset = unpack_bits(zeros, bits, groups).to(scales.dtype)[..., None]
    return codes.sub_(offset).mul_(scales[..., None]).flatten(-2)[..., :width]
