"""Lowering of expert routing: each expert runs on the rows that chose it, and on no others.

Every expert is spelled out with its slice of the stacked weights; an expert that no token chose works
on zero rows. The slices are initializers that show parts of the same bytes of the weights file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from ...ir.ops import einfold_ops
from .builder import DTYPES
from .einfold_ops import gate_of
from .lowerings import Context, lowering
from .quantized import Codes, checked_kind, dequantize_linear, matmul_nbits

aten = torch.ops.aten

Project = Callable[[int, ir.Value], ir.Value]


@lowering(einfold_ops.experts.default)
def experts(context: Context, node: fx.Node) -> ir.Value:
    found = context.arguments(node)

    def project(weight: Any, bias: Any) -> Project:
        def apply(expert: int, x: ir.Value) -> ir.Value:
            matrix = expert_slice(context, weight, expert)
            return context.builder.op("Gemm", x, matrix, _bias(context, bias, expert), transB=1)

        return apply

    gate_up = project(found["gate_up_ENM"], found["gate_up_bias_EN"])
    down = project(found["down_EMI"], found["down_bias_EM"])
    return route(context, found, int(found["gate_up_ENM"].meta["val"].shape[0]), gate_up, down)


@lowering(einfold_ops.quantized_experts.default)
def quantized_experts(context: Context, node: fx.Node) -> ir.Value:
    found = context.arguments(node)
    hidden = int(found["x_TM"].meta["val"].shape[1])
    inner = int(found["gate_up_packed"].meta["val"].shape[1]) // 2
    gate_up = _quantized_project(context, node, "gate_up", hidden)
    down = _quantized_project(context, node, "down", inner)
    return route(context, found, int(found["gate_up_packed"].meta["val"].shape[0]), gate_up, down)


def _quantized_project(context: Context, node: fx.Node, part: str, width: int) -> Project:
    found = context.arguments(node)
    packed, scales = found[f"{part}_packed"], found[f"{part}_scales"]
    zeros, bias = found[f"{part}_zeros"], found[f"{part}_bias"]
    bits, block = int(found["bits"]), int(found["block"])
    builder = context.builder
    _, rows, groups, _ = builder.placements[context.weight_name(packed)].shape

    def ort(expert: int, x: ir.Value) -> ir.Value:
        codes = Codes(
            expert_slice(context, packed, expert),
            expert_slice(context, scales, expert),
            None if zeros is None else expert_slice(context, zeros, expert),
            bits,
        )
        return matmul_nbits(context, x, codes, _bias(context, bias, expert), block, (rows, width))

    def portable(expert: int, x: ir.Value) -> ir.Value:
        kind = checked_kind(context, node, bits, groups, zeros is not None)
        codes = expert_slice(context, packed, expert, shape=(rows, groups * block), dtype=kind)
        if zeros is None:
            offsets = builder.filled((rows, groups), 1 << (bits - 1), kind)
        else:
            offsets = expert_slice(context, zeros, expert, shape=(rows, groups), dtype=kind)
        scale = expert_slice(context, scales, expert)
        weight = dequantize_linear(context, codes, scale, offsets, block, width)
        return builder.op("Gemm", x, weight, _bias(context, bias, expert), transB=1)

    return ort if context.flavour == "ort" else portable


def expert_slice(
    context: Context,
    weight: Any,
    expert: int,
    shape: tuple[int, ...] | None = None,
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """Expert `expert` of a weight stacked along its first axis, as its own initializer.

    Of one that is stored in a shorter type the slice is widened, not the whole.
    """
    if weight.target is aten._to_copy.default:
        part = expert_slice(context, weight.args[0], expert, shape, dtype)
        return context.builder.shared("Cast", part, to=int(DTYPES[weight.meta["val"].dtype]))
    name = context.weight_name(weight)
    place = context.builder.placements[name]
    length = place.length // place.shape[0]
    return context.builder.weight(
        name, shape=shape or place.shape[1:], dtype=dtype, start=expert * length, length=length
    )


def _bias(context: Context, bias: Any, expert: int) -> ir.Value | None:
    return None if bias is None else expert_slice(context, bias, expert)


def route(
    context: Context, found: dict[str, Any], count: int, gate_up: Project, down: Project
) -> ir.Value:
    """The sum over experts of what each gives for its rows, by its products `gate_up` and `down`."""
    builder = context.builder
    x, index, weight = (context.value(found[key]) for key in ("x_TM", "index_TJ", "weight_TJ"))
    out = builder.op("Mul", x, builder.floats(0.0))
    for expert in range(count):
        chosen = builder.op("Equal", index, builder.constant(expert, np.int64))
        # NonZero has no kernel for bool everywhere; float is supported by all.
        places = builder.op(
            "NonZero", builder.op("Cast", chosen, to=int(ir.DataType.FLOAT))
        )  # [2, n]
        token = builder.op("Gather", places, builder.constant(0, np.int64), axis=0)
        rows = builder.op("Gather", x, token, axis=0)
        gate, up = builder.multi("Split", 2, gate_up(expert, rows), axis=-1, num_outputs=2)
        hidden = gate_of(context, gate, up, found["kind"], found["alpha"], found["limit"])
        share = builder.op("GatherND", weight, builder.transpose(places, 1, 0))
        result = builder.op(
            "Mul", down(expert, hidden), builder.op("Unsqueeze", share, builder.ints(1))
        )
        where = builder.op(
            "Expand", builder.op("Unsqueeze", token, builder.ints(1)), builder.op("Shape", result)
        )
        out = builder.op("ScatterElements", out, where, result, axis=0, reduction="add")
    return out
