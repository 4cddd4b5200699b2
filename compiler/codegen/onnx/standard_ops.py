"""Lowerings of ATen operators to standard ONNX operators."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from .lowerings import Context, lowering, unsupported
from .operands import computed, given, operand, shape_operand, size_of

aten = torch.ops.aten


@lowering(aten.gather.default)
def gather(context: Context, node: fx.Node) -> ir.Value:
    x, dim, index = node.args[:3]
    return context.builder.op("GatherElements", context.value(x), context.value(index), axis=dim)


@lowering(aten.scatter.src)
def scatter(context: Context, node: fx.Node) -> ir.Value:
    builder, (x, dim, index, source) = context.builder, node.args[:4]
    places, values = context.value(index), context.value(source)
    known = [context.shape(index), context.shape(source)]
    if known[0] != known[1] or None in known[0]:
        # torch writes of a larger source what the index has places for.
        starts, ends = builder.ints(*[0] * len(known[0])), builder.shared("Shape", places)
        values = builder.op("Slice", values, starts, ends)
    return builder.op("ScatterElements", context.value(x), places, values, axis=dim)


@lowering(aten.softmax.int, aten._softmax.default)
def softmax(context: Context, node: fx.Node) -> ir.Value:
    x = operand(context, node.args[0], node.meta["val"].dtype)
    return context.builder.op("Softmax", x, axis=node.args[1])


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
    dtype = computed(node.meta["val"].dtype)
    x = operand(context, found["self"], dtype)
    keep = int(found["keepdim"])
    out = context.builder.op(kind, x, axes, keepdims=keep)
    if kind == "ReduceMax" and dtype.is_floating_point:  # which passes NaN over, as torch does not
        unknown = context.builder.cast(context.builder.op("IsNaN", x), torch.int32)
        unknown = context.builder.op("ReduceMax", unknown, axes, keepdims=keep)
        nan = operand(context, math.nan, dtype)
        out = context.builder.op("Where", context.builder.cast(unknown, torch.bool), nan, out)
    return given(context, out, dtype, node)


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


@lowering(aten.reshape.default, aten.view.default)
def reshape(context: Context, node: fx.Node) -> ir.Value:
    source, sizes = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    flat = _as_it_came(context, node, source)
    if flat is not None:
        return flat
    # The sizes in the graph may hold -1; the inferred shape names every dim.
    wanted = list(sizes)  # type: ignore[arg-type]
    for index, size in enumerate(node.meta["val"].shape):
        if wanted[index] == -1 and isinstance(size, int):
            wanted[index] = size
    return context.builder.op(
        "Reshape", context.value(source), shape_operand(context, wanted, source)
    )


def _as_it_came(context: Context, node: fx.Node, source: fx.Node) -> ir.Value | None:
    """Heads joined to what they were made from; None where they were not, or this joins others."""
    width = math.prod(source.meta["val"].shape[2:])
    flat = context.flat.get(context.value(source))
    return flat if context.shape(node) == [None, None, width] else None


@lowering(aten.expand.default)
def expand(context: Context, node: fx.Node) -> ir.Value:
    sizes = [1 if size == -1 else size for size in node.args[1]]  # type: ignore[union-attr]
    return context.builder.op("Expand", context.value(node.args[0]), shape_operand(context, sizes))


@lowering(aten.reshape_as.default, aten.expand_as.default)
def as_another(context: Context, node: fx.Node) -> ir.Value:
    kind = "Expand" if node.target is aten.expand_as.default else "Reshape"
    shape = context.builder.shared("Shape", context.value(node.args[1]))
    return context.builder.op(kind, context.value(node.args[0]), shape)


@lowering(aten.flatten.using_ints, aten.unflatten.int)
def regroup(context: Context, node: fx.Node) -> ir.Value:
    """Axes in a row as one, or one as several, of which one may be known at run time alone."""
    found, own = context.arguments(node), context.shape(node)
    flat = _as_it_came(context, node, found["self"])
    if flat is not None:
        return flat
    source, rank = context.value(found["self"]), len(context.shape(found["self"]))
    start = int(found.get("start_dim", found.get("dim", 0))) % max(rank, 1)
    after = rank - 1 - found["end_dim"] % max(rank, 1) if "end_dim" in found else rank - 1 - start
    end = len(own) - after
    if own[start:end].count(None) > 1:
        raise unsupported(node, "several sizes that are known only at run time")
    behind = [_known(context, source, rank - after + at, own[end + at]) for at in range(after)]
    middle = [-1 if size is None else size for size in own[start:end]]
    sizes = shape_operand(context, [*[0] * start, *middle, *behind])
    return context.builder.op("Reshape", source, sizes)


@lowering(aten.repeat_interleave.self_int)
def repeat_interleave(context: Context, node: fx.Node) -> ir.Value:
    """Each element of an axis so many times in a row: an axis behind it, expanded and merged."""
    found, builder = context.arguments(node), context.builder
    x, shape = context.value(found["self"]), context.shape(found["self"])
    if found["dim"] is None:
        x, shape = builder.reshape(x, [-1]), [None]
    dim = (found["dim"] or 0) % max(len(shape), 1)
    spread = [*[1] * (dim + 1), found["repeats"], *[1] * (len(shape) - dim - 1)]
    more = builder.op("Unsqueeze", x, builder.ints(dim + 1))
    more = builder.op("Expand", more, shape_operand(context, spread))
    behind = [_known(context, x, at, shape[at]) for at in range(dim + 1, len(shape))]
    sizes: list[Any] = [*[0] * dim, -1, *behind]
    return builder.op("Reshape", more, shape_operand(context, sizes))


def _known(context: Context, source: ir.Value, axis: int, size: int | None) -> int | ir.Value:
    """The size of an axis, asked of the tensor where it varies."""
    return context.builder.dim(source, axis) if size is None else size


@lowering(aten.constant_pad_nd.default)
def pad(context: Context, node: fx.Node) -> ir.Value:
    """torch names the last axis first, and both ends of each; what is below 0 is cut off."""
    found, builder = context.arguments(node), context.builder
    dtype, rank = node.meta["val"].dtype, len(context.shape(node))
    ends = [*found["pad"], *[0] * (2 * rank - len(found["pad"]))]
    sizes = [*ends[0::2][::-1], *ends[1::2][::-1]]
    x = operand(context, found["self"], computed(dtype))
    value = operand(context, found["value"], computed(dtype))
    return given(
        context, builder.op("Pad", x, shape_operand(context, sizes), value), computed(dtype), node
    )


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
    if len(context.shape(node)) == len(context.shape(node.args[0])):
        return context.value(node.args[0])  # an axis of more than one stays
    return context.builder.op(
        "Squeeze", context.value(node.args[0]), context.builder.ints(*_ints([node.args[1]]))
    )


@lowering(aten.cat.default)
def cat(context: Context, node: fx.Node) -> ir.Value:
    found = context.arguments(node)
    dtype = node.meta["val"].dtype
    parts = [operand(context, part, dtype) for part in found["tensors"]]
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


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]
