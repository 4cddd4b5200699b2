"""Lowerings of ATen operators to standard ONNX operators."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from .lower import Context, lowering, unsupported

aten = torch.ops.aten

_BINARY = {
    aten.add.Tensor: "Add",
    aten.sub.Tensor: "Sub",
    aten.mul.Tensor: "Mul",
    aten.div.Tensor: "Div",
    aten.pow.Tensor_Tensor: "Pow",
    aten.pow.Tensor_Scalar: "Pow",
    aten.maximum.default: "Max",
    aten.minimum.default: "Min",
}
_UNARY = {
    aten.neg.default: "Neg",
    aten.abs.default: "Abs",
    aten.exp.default: "Exp",
    aten.log.default: "Log",
    aten.sqrt.default: "Sqrt",
    aten.reciprocal.default: "Reciprocal",
    aten.tanh.default: "Tanh",
    aten.sigmoid.default: "Sigmoid",
    aten.relu.default: "Relu",
    aten.cos.default: "Cos",
    aten.sin.default: "Sin",
    aten.erf.default: "Erf",
    aten.logical_not.default: "Not",
    aten.bitwise_not.default: "Not",
    aten.floor.default: "Floor",
    aten.round.default: "Round",
    aten.sign.default: "Sign",
}
_COMPARISONS = {
    aten.gt.Scalar: "Greater",
    aten.gt.Tensor: "Greater",
    aten.ge.Scalar: "GreaterOrEqual",
    aten.ge.Tensor: "GreaterOrEqual",
    aten.lt.Scalar: "Less",
    aten.lt.Tensor: "Less",
    aten.le.Scalar: "LessOrEqual",
    aten.le.Tensor: "LessOrEqual",
    aten.eq.Scalar: "Equal",
    aten.eq.Tensor: "Equal",
    aten.logical_and.default: "And",
    aten.logical_or.default: "Or",
}


def operand(context: Context, value: Any, like: fx.Node) -> ir.Value:
    """A tensor argument, or a Python number as a constant of the result's dtype."""
    if isinstance(value, fx.Node):
        if not isinstance(value.meta["val"], torch.Tensor):
            return context.builder.cast(size_of(context, value), like.meta["val"].dtype)
        wanted, has = like.meta["val"].dtype, value.meta["val"].dtype
        found = context.value(value)
        return (
            found if has == wanted or wanted == torch.bool else context.builder.cast(found, wanted)
        )
    array = torch.tensor(value, dtype=like.meta["val"].dtype).numpy()
    return context.builder.constant(array, array.dtype)


@lowering(*_BINARY)
def binary(context: Context, node: fx.Node) -> ir.Value:
    left, right = node.args[:2]
    if context.arguments(node).get("alpha", 1) != 1:
        raise unsupported(node, "alpha other than 1")
    kind = _BINARY[node.target]  # type: ignore[index]
    return context.builder.op(kind, operand(context, left, node), operand(context, right, node))


@lowering(*_UNARY)
def unary(context: Context, node: fx.Node) -> ir.Value:
    return context.builder.op(_UNARY[node.target], context.value(node.args[0]))  # type: ignore[index]


@lowering(*_COMPARISONS)
def comparison(context: Context, node: fx.Node) -> ir.Value:
    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    other = right if isinstance(right, fx.Node) else operand(context, right, left)
    value = context.value(other) if isinstance(other, fx.Node) else other
    return context.builder.op(_COMPARISONS[node.target], context.value(left), value)  # type: ignore[index]


@lowering(aten.square.default)
def square(context: Context, node: fx.Node) -> ir.Value:
    x = context.value(node.args[0])
    return context.builder.op("Mul", x, x)


@lowering(aten.rsqrt.default)
def rsqrt(context: Context, node: fx.Node) -> ir.Value:
    return context.builder.op("Reciprocal", context.builder.op("Sqrt", context.value(node.args[0])))


@lowering(aten.silu.default)
def silu(context: Context, node: fx.Node) -> ir.Value:
    x = context.value(node.args[0])
    return context.builder.op("Mul", x, context.builder.op("Sigmoid", x))


@lowering(aten.gelu.default)
def gelu(context: Context, node: fx.Node) -> ir.Value:
    return context.builder.op(
        "Gelu", context.value(node.args[0]), approximate=context.arguments(node)["approximate"]
    )


@lowering(aten.clamp.default)
def clamp(context: Context, node: fx.Node) -> ir.Value:
    found = context.arguments(node)
    bounds = [
        None if found[key] is None else operand(context, found[key], node) for key in ("min", "max")
    ]
    return context.builder.op("Clip", context.value(found["self"]), *bounds)


@lowering(aten.masked_fill.Scalar)
def masked_fill(context: Context, node: fx.Node) -> ir.Value:
    x, mask, value = node.args
    return context.builder.op(
        "Where", context.value(mask), operand(context, value, node), context.value(x)
    )


@lowering(aten.gather.default)
def gather(context: Context, node: fx.Node) -> ir.Value:
    x, dim, index = node.args[:3]
    return context.builder.op("GatherElements", context.value(x), context.value(index), axis=dim)


@lowering(aten._to_copy.default)
def cast(context: Context, node: fx.Node) -> ir.Value:
    return context.builder.cast(context.value(node.args[0]), node.meta["val"].dtype)


@lowering(aten.softmax.int, aten._softmax.default)
def softmax(context: Context, node: fx.Node) -> ir.Value:
    return context.builder.op("Softmax", operand(context, node.args[0], node), axis=node.args[1])


@lowering(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(context: Context, node: fx.Node) -> ir.Value:
    return context.builder.op("MatMul", context.value(node.args[0]), context.value(node.args[1]))


@lowering(aten.sum.dim_IntList, aten.mean.dim, aten.amax.default)
def reduce(context: Context, node: fx.Node) -> ir.Value:
    kind = {
        aten.sum.dim_IntList: "ReduceSum",
        aten.mean.dim: "ReduceMean",
        aten.amax.default: "ReduceMax",
    }[
        node.target  # type: ignore[index]
    ]
    found = context.arguments(node)
    axes = context.builder.ints(*_ints(found["dim"])) if found["dim"] else None
    return context.builder.op(
        kind, operand(context, found["self"], node), axes, keepdims=int(found["keepdim"])
    )


@lowering(aten.topk.default)
def topk(context: Context, node: fx.Node) -> list[ir.Value]:
    found = context.arguments(node)
    return context.builder.multi(
        "TopK",
        2,
        context.value(found["self"]),
        context.builder.ints(found["k"]),
        axis=found["dim"],
        largest=int(found["largest"]),
        sorted=int(found["sorted"]),
    )


# Shapes. A size in the graph is a node whose value is an integer; it becomes a tensor only where a
# shape cannot be written with constants, 0 ("as in the input") and -1 ("what is left").


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


@lowering(aten.reshape.default, aten.view.default)
def reshape(context: Context, node: fx.Node) -> ir.Value:
    source, sizes = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    flat = context.flat.get(context.value(source))
    width = math.prod(source.meta["val"].shape[2:])
    if flat is not None and context.shape(node) == [None, None, width]:
        return flat
    # The sizes in the graph may hold -1; the inferred shape names every dim.
    wanted = list(sizes)  # type: ignore[arg-type]
    for index, size in enumerate(node.meta["val"].shape):
        if wanted[index] == -1 and isinstance(size, int):
            wanted[index] = size
    return context.builder.op(
        "Reshape", context.value(source), shape_operand(context, wanted, source)
    )


@lowering(aten.expand.default)
def expand(context: Context, node: fx.Node) -> ir.Value:
    sizes = [1 if size == -1 else size for size in node.args[1]]  # type: ignore[union-attr]
    return context.builder.op("Expand", context.value(node.args[0]), shape_operand(context, sizes))


@lowering(aten.transpose.int, aten.t.default)
def transpose(context: Context, node: fx.Node) -> ir.Value:
    rank = node.meta["val"].dim()
    found = context.arguments(node)
    perm = list(range(rank))
    a, b = found.get("dim0", 0) % rank, found.get("dim1", 1) % rank
    perm[a], perm[b] = perm[b], perm[a]
    return context.builder.transpose(context.value(node.args[0]), *perm)


@lowering(aten.permute.default)
def permute(context: Context, node: fx.Node) -> ir.Value:
    rank = node.meta["val"].dim()
    return context.builder.transpose(
        context.value(node.args[0]), *(d % rank for d in _ints(node.args[1]))
    )


@lowering(aten.unsqueeze.default)
def unsqueeze(context: Context, node: fx.Node) -> ir.Value:
    return context.builder.op(
        "Unsqueeze", context.value(node.args[0]), context.builder.ints(*_ints([node.args[1]]))
    )


@lowering(aten.squeeze.dim)
def squeeze(context: Context, node: fx.Node) -> ir.Value:
    return context.builder.op(
        "Squeeze", context.value(node.args[0]), context.builder.ints(*_ints([node.args[1]]))
    )


@lowering(aten.cat.default)
def cat(context: Context, node: fx.Node) -> ir.Value:
    found = context.arguments(node)
    parts = [context.value(part) for part in found["tensors"]]
    if found["dim"] == 2 and all(part in context.flat for part in parts):
        # Heads of several attentions: joined as they came, and reshaped for whoever wants them apart.
        flat = context.builder.op("Concat", *(context.flat[part] for part in parts), axis=2)
        heads = context.builder.reshape(flat, [0, 0, *node.meta["val"].shape[2:]])
        context.flat[heads] = flat
        return heads
    return context.builder.op("Concat", *parts, axis=found["dim"])


@lowering(aten.split_with_sizes.default)
def split(context: Context, node: fx.Node) -> list[ir.Value]:
    found = context.arguments(node)
    return context.builder.split(
        context.value(found["self"]), _ints(found["split_sizes"]), found["dim"]
    )


@lowering(aten.slice.Tensor)
def slice_(context: Context, node: fx.Node) -> ir.Value:
    found = context.arguments(node)
    builder = context.builder
    start = size_of(context, found["start"] or 0)
    end = size_of(context, 2**62 if found["end"] is None else found["end"])
    return builder.op(
        "Slice",
        context.value(found["self"]),
        start,
        end,
        builder.ints(found["dim"]),
        builder.ints(found["step"]),
    )


@lowering(aten.select.int)
def select(context: Context, node: fx.Node) -> ir.Value:
    found = context.arguments(node)
    index = context.builder.constant(found["index"], "int64")
    return context.builder.op("Gather", context.value(found["self"]), index, axis=found["dim"])


@lowering(aten.index_select.default)
def index_select(context: Context, node: fx.Node) -> ir.Value:
    found = context.arguments(node)
    return context.builder.op(
        "Gather", context.value(found["self"]), context.value(found["index"]), axis=found["dim"]
    )


@lowering(aten.full.default)
def full(context: Context, node: fx.Node) -> ir.Value:
    value = torch.tensor([node.args[1]], dtype=node.meta["val"].dtype).numpy()
    shape = shape_operand(context, node.args[0])  # type: ignore[arg-type]
    return context.builder.op("ConstantOfShape", shape, value=ir.tensor(value))


@lowering(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(context: Context, node: fx.Node) -> ir.Value:
    bounds: list[Any] = list(node.args)
    if len(bounds) == 1:
        bounds = [0, *bounds]
    if len(bounds) == 2:
        bounds.append(1)
    dtype = node.meta["val"].dtype
    builder = context.builder
    scalars = [
        builder.op("Squeeze", operand(context, bound, node))
        if isinstance(bound, fx.Node)
        else operand(context, bound, node)
        for bound in bounds
    ]
    if dtype not in (torch.int64, torch.float32):
        raise unsupported(node, f"a range of {dtype}")
    return builder.op("Range", *scalars)


@lowering(aten.where.self)
def where(context: Context, node: fx.Node) -> ir.Value:
    condition, left, right = node.args
    return context.builder.op(
        "Where",
        context.value(condition),
        operand(context, left, node),
        operand(context, right, node),
    )


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]
