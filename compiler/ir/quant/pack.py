"""Group-wise quantized weights in torch: packing, and what the packed form stands for.

A weight [N, M] is cut along M into G = ceil(M / block) groups. With `bits` b (2, 4 or 8) a value is
    w = (q - z) * s,      q in 0 .. 2^b - 1,
s one scale and z one zero point a group; without zero points z = 2^(b-1).
    packed  uint8   [N, G, block * b / 8]     low bits first; a short last group is padded with z
    scales  float   [N, G]
    zeros   uint8   [N, ceil(G * b / 8)]      packed in the same way, or None
This is byte for byte what onnxruntime's MatMulNBits reads, and, seen as [N, M], what ONNX's
DequantizeLinear with `block_size` reads, so weights go to a file as they are. Codes of 3, 5 and 6 bits lie in
two such planes: q = 2^l * high + low, with l low bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

#: The smallest number above zero of float16, and the largest.
_HALF = (2.0**-24, 65504.0)


def in_blocks(rows: Tensor, block: int) -> Tensor:
    """The last axis cut into groups of `block` numbers, padded with zeros."""
    groups: Tensor = functional.pad(rows, (0, -rows.shape[-1] % block)).unflatten(-1, (-1, block))
    return groups


def halved(values: Tensor) -> Tensor:
    """The numbers in float16, cut to its largest."""
    return values.clamp(-_HALF[1], _HALF[1]).half()


def float16_scales(scales: Tensor) -> Tensor:
    """Scales as float16 holds them, in float32: with their sign, and neither zero nor infinite."""
    size = scales.abs().clamp(*_HALF).half().float()
    return torch.where(scales < 0, -size, size)


def pack_planes(
    codes: Tensor, high_bits: int, low_bits: int, names: tuple[str, str]
) -> dict[str, Tensor]:
    """Codes packed by `pack_bits`: the high bits, and beside them the low ones where there are some."""
    if not low_bits:
        return {names[0]: pack_bits(codes, high_bits)}
    codes = codes.to(torch.uint8)
    low = pack_bits(codes & ((1 << low_bits) - 1), low_bits)
    return {names[0]: pack_bits(codes >> low_bits, high_bits), names[1]: low}


def unpack_planes(
    high: Tensor, low: Tensor | None, high_bits: int, low_bits: int, count: int
) -> Tensor:
    """The inverse of `pack_planes`; `low` is None where all bits are high ones."""
    if low is None:
        return unpack_bits(high, high_bits, count)
    shifted = unpack_bits(high, high_bits, count) << low_bits
    return shifted | unpack_bits(low, low_bits, count)


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
