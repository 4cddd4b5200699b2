"""Reductions and what is made of them: sums, extremes, moments, norms, softmax in all its spellings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ...ir.cascade.expr import Const, Expr, Size, apply
from .context import Context, Value
from .ranks import NotExpressedError


def combine(context: Context, op: str, a: Value, b: Value | float) -> Value:
    """A pointwise operator on two values that broadcast."""
    if not isinstance(b, Value):
        return replace(a, expr=apply(op, a.expr, float(b)))
    (a, b), dims = context.align([a, b])
    return Value(dims, apply(op, a.expr, b.expr), a.kind, a.real | b.real)


def mapped(value: Value, op: str) -> Value:
    """A pointwise operator on one value."""
    return replace(value, expr=apply(op, value.expr))


def dims_of(value: Value, dims: int | Sequence[int] | None) -> list[int]:
    """The dimensions that an ATen reduction names; none or an empty list means all."""
    width = len(value.dims)
    if dims is None or (not isinstance(dims, int) and not dims):
        return list(range(width))
    return [dim % max(width, 1) for dim in ([dims] if isinstance(dims, int) else dims)]


def count(context: Context, value: Value, dims: Sequence[int]) -> Expr:
    """How many coordinates the dimensions have, as an expression."""
    value = context.now(value)
    total: Expr = Const(1.0)
    for dim in dims:
        for rank in value.dims[dim]:
            if context.ranks.virtual.get(rank) and rank not in value.real:
                raise NotExpressedError("a mean over a joined rank")
            total = Size(rank) if total == Const(1.0) else apply("mul", total, Size(rank))
    return total


def mean(context: Context, name: str, value: Value, dims: Sequence[int], keep: bool) -> Value:
    """sum / size."""
    total = context.reduce(f"{name}_sum", "sum", value, dims, keep)
    size = count(context, value, dims)
    if size == Const(1.0):
        return total
    return context.state(name, replace(total, expr=apply("div", total.expr, size), kind="real"))


def variance(
    context: Context, name: str, value: Value, dims: Sequence[int], correction: float, keep: bool
) -> tuple[Value, Value]:
    """The variance around the mean, and the mean."""
    value = context.state(f"{name}_of", value)
    middle = mean(context, f"{name}_mean", value, dims, True)
    away = combine(context, "sub", value, middle)
    square = replace(away, expr=apply("pow", away.expr, 2.0))
    total = context.reduce(f"{name}_sum", "sum", square, dims, keep)
    size = count(context, value, dims)
    if correction:
        size = apply("sub", size, float(correction))
    found = context.state(name, replace(total, expr=apply("div", total.expr, size)))
    if not keep:
        gone = set(dims)
        middle = replace(
            middle, dims=tuple(d for at, d in enumerate(middle.dims) if at not in gone)
        )
    return found, middle


def softmax(context: Context, name: str, value: Value, dim: int, log: bool = False) -> Value:
    """exp(x - max) / sum, or its logarithm x - max - log(sum)."""
    value = context.state(f"{name}_of", value)
    top = context.reduce(f"{name}_max", "max", value, [dim], True)
    away = context.state(f"{name}_away", combine(context, "sub", value, top)) if log else None
    shifted = away or combine(context, "sub", value, top)
    weight = mapped(shifted, "exp")
    if not log:
        weight = context.state(f"{name}_exp", weight)
    total = context.reduce(f"{name}_sum", "sum", weight, [dim], True)
    if log:
        return context.state(name, combine(context, "sub", shifted, mapped(total, "log")))
    return context.state(name, combine(context, "div", weight, total))


def logsumexp(context: Context, name: str, value: Value, dims: Sequence[int], keep: bool) -> Value:
    """max + log(sum of exp(x - max)); like ATen, the maximum counts as 0 where it is infinite."""
    value = context.state(f"{name}_of", value)
    top = context.reduce(f"{name}_max", "max", value, dims, True)
    finite = apply("eq", apply("abs", top.expr), math.inf)
    top = context.state(f"{name}_top", replace(top, expr=apply("where", finite, 0.0, top.expr)))
    weight = mapped(combine(context, "sub", value, top), "exp")
    total = context.reduce(f"{name}_sum", "sum", weight, dims, True)
    found = context.state(name, combine(context, "add", top, mapped(total, "log")))
    if keep:
        return found
    gone = {dim % len(found.dims) for dim in dims}
    return replace(found, dims=tuple(d for at, d in enumerate(found.dims) if at not in gone))


def norm(
    context: Context, name: str, value: Value, order: float, dims: Sequence[int], keep: bool
) -> Value:
    """The vector norm of order 1, 2, infinity, or any positive one."""
    size = mapped(value, "abs")
    if order == math.inf:
        return context.reduce(name, "max", size, dims, keep)
    if order == 2:
        total = context.reduce(
            f"{name}_sum", "sum", replace(value, expr=apply("pow", value.expr, 2.0)), dims, keep
        )
        return context.state(name, mapped(total, "sqrt"))
    if order == 1:
        return context.reduce(name, "sum", size, dims, keep)
    if order <= 0:
        raise NotExpressedError(f"a norm of order {order}")
    power = replace(size, expr=apply("pow", size.expr, float(order)))
    total = context.reduce(f"{name}_sum", "sum", power, dims, keep)
    return context.state(name, replace(total, expr=apply("pow", total.expr, 1 / order)))


def layer_norm(
    context: Context,
    name: str,
    value: Value,
    width: int,
    weight: Value | None,
    bias: Value | None,
    epsilon: float,
    centred: bool = True,
) -> tuple[Value, Value | None, Value]:
    """LayerNorm, or RMSNorm where not centred, over the last `width` dimensions; its mean and 1/deviation."""
    dims = list(range(len(value.dims) - width, len(value.dims)))
    value = context.state(f"{name}_of", value)
    middle: Value | None = None
    if centred:
        spread, middle = variance(context, f"{name}_var", value, dims, 0, True)
        away = combine(context, "sub", value, middle)
    else:
        square = replace(value, expr=apply("pow", value.expr, 2.0))
        spread, away = mean(context, f"{name}_square", square, dims, True), value
    root = apply("sqrt", apply("add", spread.expr, float(epsilon)))
    inverse = context.state(f"{name}_scale", replace(spread, expr=apply("div", 1.0, root)))
    found = combine(context, "mul", away, inverse)
    if weight is not None:
        found = combine(context, "mul", found, weight)
    if bias is not None:
        found = combine(context, "add", found, bias)
    return context.state(name, found), middle, inverse
