"""Group-wise quantized weights: the packed format, and the operators that read it.

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

from .activation import gated_activation_reference
from .experts import pick, route

BITS = (2, 4, 8)

#: Weights that are widened at a time in a product: bounds its memory at some tens of megabytes.
_SLAB = 1 << 22


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
    per_byte = 8 // bits
    mask = (1 << bits) - 1
    parts = [(packed >> (bits * index)) & mask for index in range(per_byte)]
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


@torch.library.custom_op("einfold::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    block: int,
) -> Tensor:
    """x @ dequantized.T + bias, for x [..., M]."""
    width = x.shape[-1]
    step = max(1, _SLAB // width)
    parts = [
        functional.linear(
            x,
            dequantize(
                packed[start : start + step],
                scales[start : start + step],
                None if zeros is None else zeros[start : start + step],
                bits,
                block,
                width,
            ),
        )
        for start in range(0, packed.shape[0], step)
    ]
    out = torch.cat(parts, dim=-1)
    return out if bias is None else out + bias


@quantized_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    block: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.custom_op("einfold::quantized_embedding", mutates_args=())
def quantized_embedding(
    ids: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    block: int,
    width: int,
) -> Tensor:
    """Rows `ids` of the dequantized table [V, width]."""
    zero_rows = None if zeros is None else zeros[ids]
    return dequantize(packed[ids], scales[ids], zero_rows, bits, block, width)


@quantized_embedding.register_fake
def _(
    ids: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    block: int,
    width: int,
) -> Tensor:
    return scales.new_empty((*ids.shape, width))


@torch.library.custom_op("einfold::quantized_experts", mutates_args=())
def quantized_experts(
    x_TM: Tensor,
    index_TJ: Tensor,
    weight_TJ: Tensor,
    gate_up_packed: Tensor,
    gate_up_scales: Tensor,
    gate_up_zeros: Tensor | None,
    gate_up_bias: Tensor | None,
    down_packed: Tensor,
    down_scales: Tensor,
    down_zeros: Tensor | None,
    down_bias: Tensor | None,
    kind: str,
    alpha: float,
    limit: float,
    bits: int,
    block: int,
) -> Tensor:
    """`einfold::experts` over packed weights: a leading axis E on every weight."""

    def apply(
        expert: int, rows: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None
    ) -> Tensor:
        weight = dequantize(
            packed[expert], scales[expert], pick(zeros, expert), bits, block, rows.shape[-1]
        )
        return rows @ weight.T

    def mlp(expert: int, rows: Tensor) -> Tensor:
        gate_up = apply(expert, rows, gate_up_packed, gate_up_scales, gate_up_zeros)
        if gate_up_bias is not None:
            gate_up = gate_up + gate_up_bias[expert]
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = gated_activation_reference(gate, up, kind, alpha, limit)
        down = apply(expert, hidden, down_packed, down_scales, down_zeros)
        return down if down_bias is None else down + down_bias[expert]

    return route(x_TM, index_TJ, weight_TJ, mlp)


@quantized_experts.register_fake
def _(x_TM: Tensor, *args: object) -> Tensor:
    return torch.empty_like(x_TM)
