"""Operators that move, merge, cut and repeat dimensions: new dimensions over the same expression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ...ir.cascade.expr import Const, Expr, Pos, Virtual, apply
from .context import Context, Value
from .ranks import NotExpressedError

#: Parts of a computed value, and logits that are joined to others, are written out up to this many.
_FEW = 8


def reshape(context: Context, value: Value, sizes: Sequence[int]) -> Value:
    """Merges and cuts dimensions. [.., a*b, ..] <-> [.., a, b, ..]"""
    value = context.now(value)
    groups = context.ranks.regroup(value.ranks, sizes, value.real)
    return context.now(replace(value, dims=tuple(groups)))


def permute(value: Value, order: Sequence[int]) -> Value:
    """Reorders dimensions."""
    return replace(value, dims=tuple(value.dims[at] for at in order))


def unsqueeze(value: Value, dim: int) -> Value:
    """Adds a dimension of size one."""
    at = dim % (len(value.dims) + 1)
    return replace(value, dims=(*value.dims[:at], (), *value.dims[at:]))


def squeeze(value: Value, dims: Sequence[int] | None) -> Value:
    """Drops dimensions of size one."""
    wide = len(value.dims)
    at = set(range(wide)) if dims is None else {dim % wide for dim in dims}
    kept = tuple(dim for place, dim in enumerate(value.dims) if place not in at or dim)
    return replace(value, dims=kept)


def expand(context: Context, value: Value, sizes: Sequence[int], extents: Sequence[str]) -> Value:
    """Repeats dimensions of size one; the value varies along none of the new ranks."""
    value = replace(value, dims=((),) * (len(sizes) - len(value.dims)) + value.dims)
    dims = tuple(
        dim if dim or size in (1, -1) else (context.ranks.fresh(size, extent),)
        for dim, size, extent in zip(value.dims, sizes, extents, strict=True)
    )
    context.ranks.keep_apart([rank for dim in dims for rank in dim])
    return replace(value, dims=dims)


def repeat(context: Context, value: Value, times: Sequence[int]) -> Value:
    """Tiles dimensions: the repetition is an outer rank that the value does not vary along."""
    value = replace(value, dims=((),) * (len(times) - len(value.dims)) + value.dims)
    dims = tuple(
        (context.ranks.fresh(count), *dim) if count > 1 else dim
        for dim, count in zip(value.dims, times, strict=True)
    )
    context.ranks.keep_apart([rank for dim in dims for rank in dim])
    return replace(value, dims=dims)


def repeat_interleave(context: Context, value: Value, count: int, dim: int) -> Value:
    """Repeats each coordinate: the repetition is an inner rank."""
    at = dim % len(value.dims)
    inner = (context.ranks.fresh(count),) if count > 1 else ()
    dims = (*value.dims[:at], (*value.dims[at], *inner), *value.dims[at + 1 :])
    context.ranks.keep_apart([rank for group in dims for rank in group])
    return replace(value, dims=dims)


def concatenate(context: Context, name: str, values: Sequence[Value], dim: int) -> Value:
    """Joins one long tensor with few coordinates more: these become virtual ones.

    [scores over t] + [a sink] -> one value over t with a virtual coordinate that holds the sink.
    Anything else that is joined is no cascade.
    """
    at = dim % len(values[0].dims)
    place = _longest(context, values, at)
    if len(values[place].dims[at]) != 1:
        raise NotExpressedError("a join along a merged dimension")
    main = context.now(values[place])
    (rank,) = main.dims[at]
    if context.ranks.virtual.get(rank):
        raise NotExpressedError("a second join along a rank")
    parts = [_coordinates(context, name, value, at) for value in values[:place]]
    front = sum(len(part) for part in parts)
    parts += [_coordinates(context, name, value, at) for value in values[place + 1 :]]
    others = [one for part in parts for one in part]
    size, extent = context.ranks.sizes[rank], context.ranks.extents[rank]
    extended = context.ranks.fresh(size, extent, len(others))
    main = context.instance(main, {rank: extended})
    aligned, _ = context.align([_without(main, at), *others])
    expr = aligned[0].expr
    for number, other in enumerate(aligned[1:]):
        expr = apply("where", Virtual(extended, number), other.expr, expr)
    dims = list(aligned[0].dims)
    dims.insert(at, (extended,))
    context.ranks.keep_apart([r for group in dims for r in group])
    joined = Value(tuple(dims), expr, main.kind, main.real - {extended})
    context.fronts[extended], context.joins[extended] = front, name
    return context.now(joined)


def _longest(context: Context, values: Sequence[Value], at: int) -> int:
    """Which tensor the others are joined to: they have length one, or are few beside a computed one."""
    sizes = [math.prod(context.ranks.size(r, v.real) for r in v.dims[at]) for v in values]
    place = sizes.index(max(sizes))
    rest = sum(sizes) - sizes[place]
    few = rest <= _FEW and rest < sizes[place] and context.is_computed(values[place])
    if not values[place].dims[at] or not (few or sum(size > 1 for size in sizes) == 1):
        raise NotExpressedError("only tensors of length one can be joined to a rank")
    return place


def _coordinates(context: Context, name: str, value: Value, at: int) -> list[Value]:
    """A tensor at each of its coordinates, without the dimension."""
    if not value.dims[at]:
        return [_without(value, at)]
    (rank, *more) = value.dims[at]
    if more or context.ranks.virtual.get(rank):
        raise NotExpressedError("a join of merged or joined dimensions")
    count = context.ranks.sizes[rank]
    return [pick(context, f"{name}_{number}", value, at, number) for number in range(count)]


def pick(context: Context, name: str, value: Value, dim: int, number: int) -> Value:
    """One coordinate of a dimension, as a sum of one: sum over r of where(pos(r) == number, value, 0)."""
    value = context.now(value)
    at = dim % len(value.dims)
    if len(value.dims[at]) != 1 or context.ranks.virtual.get(value.dims[at][0]):
        raise NotExpressedError("one coordinate of a merged or joined dimension")
    (rank,) = value.dims[at]
    if context.ranks.sizes[rank] > _FEW or not _is_fixed(context, [rank]) or value.kind == "bool":
        raise NotExpressedError("one coordinate of a rank")
    here = apply("eq", Pos(rank), float(number))
    picked = replace(value, expr=apply("where", here, value.expr, 0.0))
    return context.reduce(name, "sum", picked, [at])


def _is_fixed(context: Context, ranks: Sequence[str]) -> bool:
    """Whether the sizes are numbers, whatever the inputs."""
    return all(context.ranks.extents[rank].isdigit() for rank in ranks)


def part(context: Context, name: str, value: Value, dim: int, number: int, count: int) -> Value:
    """One of `count` equal parts of a dimension of normalised weights; of others it is an input as well."""
    value = context.now(value)
    at = dim % len(value.dims)
    length = math.prod(context.ranks.sizes[rank] for rank in value.dims[at])
    fixed = _is_fixed(context, value.dims[at]) and count <= _FEW and length % count == 0
    if not fixed or not context.is_normalised(value):
        raise NotExpressedError("a slice of a rank")
    sizes = [math.prod(context.ranks.size(r, value.real) for r in group) for group in value.dims]
    sizes[at : at + 1] = [count, length // count]
    return pick(context, name, reshape(context, value, sizes), at, number)


def pieces(
    context: Context, name: str, value: Value, dim: int, sizes: Sequence[int]
) -> tuple[Value | None, ...]:
    """A dimension in pieces of these sizes; None where a piece has no form."""
    found: list[Value | None] = []
    start = 0
    for number, size in enumerate(sizes):
        try:
            found.append(cut(context, f"{name}_{number}", value, dim, start, start + size))
        except NotExpressedError:
            found.append(None)
        start += size
    if not any(found):
        raise NotExpressedError("a slice of a rank")
    return tuple(found)


def _without(value: Value, at: int) -> Value:
    return replace(value, dims=(*value.dims[:at], *value.dims[at + 1 :]))


def cut(
    context: Context, name: str, value: Value, dim: int, start: int, end: int, step: int = 1
) -> Value:
    """A slice: all of a dimension, the real coordinates of a joined one, or an equal part of weights."""
    value = context.now(value)
    at = dim % len(value.dims)
    group = value.dims[at]
    length = 1
    for rank in group:
        length *= context.ranks.size(rank, value.real)
    start = max(start + length, 0) if start < 0 else min(start, length)
    end = max(end + length, 0) if end < 0 else min(end, length)
    if step != 1:
        raise NotExpressedError("a slice with a step")
    if (start, end) == (0, length):
        return value
    rank = group[0] if len(group) == 1 else ""
    front = context.fronts.get(rank, 0)
    joined = rank and context.ranks.virtual.get(rank) and rank not in value.real
    if joined and (start, end) == (front, front + context.ranks.sizes[rank]):
        return replace(value, real=value.real | {rank})
    if not joined and end > start and start % (end - start) == 0 and length % (end - start) == 0:
        size = end - start
        return part(context, name, value, at, start // size, length // size)
    raise NotExpressedError("a slice of a rank")


def arange(context: Context, start: float, step: float, size: int, extent: str) -> Value:
    """Coordinates of a new rank."""
    if size == 1:
        return Value(((),), Const(float(start)), "integer")
    rank = context.ranks.fresh(size, extent)
    expr: Expr = Pos(rank)
    if step != 1:
        expr = apply("mul", expr, float(step))
    if start:
        expr = apply("add", expr, float(start))
    return Value(((rank,),), expr, "integer")


def filled(
    context: Context, sizes: Sequence[int], extents: Sequence[str], fill: float | bool, kind: str
) -> Value:
    """A tensor of one number."""
    dims = tuple(
        (context.ranks.fresh(size, extent),) if size != 1 else ()
        for size, extent in zip(sizes, extents, strict=True)
    )
    value = Value(dims, Const(bool(fill) if kind == "bool" else float(fill)), kind)
    context.ranks.keep_apart(value.ranks)
    return value


def triangle(context: Context, value: Value, diagonal: int, lower: bool) -> Value:
    """tril and triu: zero (or false) outside."""
    value = context.now(value)
    row, column = (_position(context, value, at) for at in (-2, -1))
    shifted = apply("add", row, float(diagonal)) if diagonal else row
    inside = apply("le" if lower else "ge", column, shifted)
    if value.kind == "bool":
        expr = inside if value.expr == Const(True) else apply("and", inside, value.expr)
    else:
        expr = apply("where", inside, value.expr, 0.0)
    return replace(value, expr=expr)


def _position(context: Context, value: Value, at: int) -> Expr:
    ranks = value.dims[at]
    if not ranks:
        return Const(0.0)
    if len(ranks) > 1:
        raise NotExpressedError("a triangle over a merged dimension")
    return Pos(ranks[0])
