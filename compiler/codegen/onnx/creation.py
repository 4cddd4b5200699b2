"""Lowerings of operators that make tensors from nothing but a size: constants, ranges, repetitions."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from .lowerings import Context, lowering
from .operands import operand, shape_operand

aten = torch.ops.aten

#: Operators that fill a size with one number, and the number; None where it is an argument. What `empty`
#: holds is anyone's guess, zeros among them.
_SIZED = {
    aten.full.default: None,
    aten.zeros.default: 0,
    aten.ones.default: 1,
    aten.empty.memory_format: 0,
    aten.new_full.default: None,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.new_empty.default: 0,
}
_LIKE = {
    aten.full_like.default: None,
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.empty_like.default: 0,
}

#: What onnxruntime counts in; others are cast.
_RANGES = (torch.float32, torch.float64, torch.int16, torch.int32, torch.int64)


@lowering(*_SIZED)
def sized(context: Context, node: fx.Node) -> ir.Value:
    found = context.arguments(node)
    return _filled(context, node, shape_operand(context, found["size"]), _SIZED[node.target])  # type: ignore[index]


@lowering(*_LIKE)
def like(context: Context, node: fx.Node) -> ir.Value:
    shape = context.builder.shared("Shape", context.value(node.args[0]))
    return _filled(context, node, shape, _LIKE[node.target])  # type: ignore[index]


def _filled(context: Context, node: fx.Node, shape: ir.Value, number: int | None) -> ir.Value:
    dtype = node.meta["val"].dtype
    value: Any = context.arguments(node)["fill_value"] if number is None else number
    if isinstance(value, fx.Node):
        return context.builder.op("Expand", operand(context, value, dtype), shape)
    array = torch.tensor([value], dtype=dtype).numpy()
    return context.builder.op("ConstantOfShape", shape, value=ir.tensor(array))


@lowering(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(context: Context, node: fx.Node) -> ir.Value:
    bounds: list[Any] = list(node.args)
    if len(bounds) == 1:
        bounds = [0, *bounds]
    if len(bounds) == 2:
        bounds.append(1)
    dtype = node.meta["val"].dtype
    counted = (
        dtype if dtype in _RANGES else torch.float32 if dtype.is_floating_point else torch.int64
    )
    numbers = context.builder.op("Range", *(operand(context, bound, counted) for bound in bounds))
    return numbers if counted == dtype else context.builder.cast(numbers, dtype)


@lowering(aten.scalar_tensor.default)
def scalar_tensor(context: Context, node: fx.Node) -> ir.Value:
    return operand(context, node.args[0], node.meta["val"].dtype)


@lowering(aten.repeat.default)
def repeat(context: Context, node: fx.Node) -> ir.Value:
    """Tile, over as many axes as there are repeats: new ones stand in front."""
    found, builder = context.arguments(node), context.builder
    x, more = (
        context.value(found["self"]),
        len(found["repeats"]) - len(context.shape(found["self"])),
    )
    if more:
        x = builder.op("Unsqueeze", x, builder.ints(*range(more)))
    return builder.op("Tile", x, shape_operand(context, found["repeats"]))
