"""Arguments of operators as ONNX values: numbers and tensors of one type, sizes and shapes.

A size in the graph is a node whose value is an integer; it becomes a tensor only where a shape cannot be
written with constants, 0 ("as in the input") and -1 ("what is left").
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from .lowerings import Context, unsupported

aten = torch.ops.aten

#: Truth values and short integers, for which onnxruntime has few kernels, and what they are computed in.
_COMPUTED = dict.fromkeys((torch.bool, torch.uint8, torch.int8, torch.int16), torch.int32)


def computed(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers of a type are added, compared and so on."""
    return _COMPUTED.get(dtype, dtype)


def promoted(*arguments: Any) -> torch.dtype:
    """The type to which torch promotes two arguments, tensors or numbers, of an operator."""
    left, right = (_typed(argument) for argument in arguments)
    return torch.result_type(left, right)


def _typed(argument: Any) -> Any:
    """What stands for an argument in a question about types; sizes are integers."""
    if not isinstance(argument, fx.Node):
        return argument
    value = argument.meta["val"]
    if isinstance(value, torch.Tensor):
        return torch.empty((1,) * value.dim(), dtype=value.dtype)
    return 1


def operand(context: Context, value: Any, dtype: torch.dtype) -> ir.Value:
    """A tensor, a size of the graph or a Python number, in a type."""
    builder = context.builder
    if not isinstance(value, fx.Node):
        array = torch.tensor(value, dtype=dtype).numpy()
        return builder.constant(array, array.dtype)
    if not isinstance(value.meta["val"], torch.Tensor):
        return builder.cast(builder.shared("Squeeze", size_of(context, value)), dtype)
    found = context.value(value)
    return found if value.meta["val"].dtype == dtype else builder.cast(found, dtype)


def given(context: Context, found: ir.Value, has: torch.dtype, node: fx.Node) -> ir.Value:
    """A result that was computed in one type, in the type that a node has."""
    wanted: torch.dtype = node.meta["val"].dtype
    return found if has == wanted else context.builder.cast(found, wanted)


def size_of(context: Context, size: Any) -> ir.Value:
    """An integer of the graph as an int64 tensor of shape [1]."""
    builder = context.builder
    if isinstance(size, int):
        return builder.ints(size)
    if size.target is aten.sym_size.int:
        return builder.dim(context.value(size.args[0]), int(size.args[1]))
    kinds = {
        operator.add: "Add",
        operator.sub: "Sub",
        operator.mul: "Mul",
        operator.floordiv: "Div",
        operator.mod: "Mod",
    }
    if size.target in kinds:
        left, right = (size_of(context, part) for part in size.args)
        return builder.shared(kinds[size.target], left, right)
    raise unsupported(size, "an integer computed in a way that ONNX shapes do not express")


def shape_operand(
    context: Context, sizes: Sequence[Any], source: fx.Node | None = None
) -> ir.Value:
    """A shape; with `source`, dims that stay where they are become 0 and one unknown dim -1."""
    builder = context.builder
    have = source.meta["val"].shape if source is not None else ()
    dims: list[Any] = []
    for index, size in enumerate(sizes):
        value = size.meta["val"] if isinstance(size, fx.Node) else size
        if isinstance(value, int):
            dims.append(value)
        elif index < len(have) and str(have[index]) == str(value):
            dims.append(0)
        else:
            dims.append(size)
    unknown = [index for index, dim in enumerate(dims) if not isinstance(dim, int)]
    if source is not None and len(unknown) == 1 and -1 not in dims:
        dims[unknown[0]] = -1
        unknown = []
    if not unknown:
        return builder.ints(*dims)
    if source is not None:
        dims = [size_of(context, sizes[i]) if dim == 0 else dim for i, dim in enumerate(dims)]
    parts = [
        builder.ints(dim)
        if isinstance(dim, int)
        else dim
        if isinstance(dim, ir.Value)
        else size_of(context, dim)
        for dim in dims
    ]
    return builder.op("Concat", *parts, axis=0)
