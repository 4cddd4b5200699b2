"""Operators that read quantized weights: groups of integers as they are (`quant/pack.py`), others widened."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ....errors import IRError
from ..quant.pack import dequantize as dequantize_groups
from ..quant.scheme import read_scheme
from ..types import DTYPES
from .activation import gated_activation_reference
from .experts import pick, route

#: Weights that are widened at a time in a product: bounds its memory at some tens of megabytes.
_SLAB = 1 << 22


def meaning_of_pieces(pieces: Sequence[Tensor], scheme: str, shape: Sequence[int]) -> Tensor:
    """The weight of a shape that pieces in any scheme, given by its text, stand for, in float32."""
    kind = read_scheme(scheme)
    named = dict(zip(kind.pieces(tuple(shape)), pieces, strict=True))
    return kind.dequantize(named, shape[-1])


dequantize = torch.library.custom_op("einfold::dequantize", meaning_of_pieces, mutates_args=())


@dequantize.register_fake
def _(pieces: Sequence[Tensor], scheme: str, shape: Sequence[int]) -> Tensor:
    expected = read_scheme(scheme).pieces(tuple(shape))
    given = [(tuple(piece.shape), piece.dtype) for piece in pieces]
    if given != [(size, DTYPES[kind]) for size, kind in expected.values()]:
        raise IRError(f"a weight {list(shape)} in the scheme {scheme} has other pieces than these")
    return pieces[0].new_empty(tuple(shape), dtype=torch.float32)


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
            dequantize_groups(
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
    return dequantize_groups(packed[ids], scales[ids], zero_rows, bits, block, width)


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
        weight = dequantize_groups(
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
