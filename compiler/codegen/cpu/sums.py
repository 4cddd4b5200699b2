"""Reductions of expressions: matrix products where the body is a product, sums and extremes otherwise.

scores[b, h, g, s, t] = q[b, h, g, s, d] * k[b, h, t, d] :: sum(d)
  -> q as [b, h, (g s), d]  @  k as [b, h, d, t]: grouped heads share their keys, nothing is repeated
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...ir.cascade.expr import Expr, Ref, ranks_of
from .expressions import as_tensor, evaluate, factors, order_of, product
from .frame import Frame, Value


def reduced(
    frame: Frame, expr: Expr, op: str | None, over: Sequence[str], ranks: Sequence[str]
) -> Value:
    """`expr` mapped over `ranks` and `over`, reduced by `op` over `over`."""
    if op is None:
        return mapped(frame, expr, ranks)
    if op == "sum":
        found = _contracted(frame, expr, over, ranks)
        if found is not None:
            return found
    order = (*ranks, *over)
    tensor = as_tensor(frame, evaluate(frame, expr, order))
    # A rank that the body does not vary along counts as often as it has coordinates.
    tensor = tensor.expand(frame.shape(order))
    dims = list(range(len(ranks), len(order)))
    if op == "sum":
        return Value(tensor.sum(dims), tuple(ranks))
    return Value(tensor.amax(dims) if op == "max" else tensor.amin(dims), tuple(ranks))


def mapped(frame: Frame, expr: Expr, ranks: Sequence[str]) -> Value:
    """The expression over `ranks`, of which it keeps those along which it varies."""
    own = order_of(expr, ranks)
    return Value(as_tensor(frame, evaluate(frame, expr, own)), own)


def _contracted(
    frame: Frame, expr: Expr, over: Sequence[str], ranks: Sequence[str]
) -> Value | None:
    parts = factors(expr)
    for at in reversed(range(len(parts))):
        right, rest = parts[at], [*parts[:at], *parts[at + 1 :]]
        if not rest:
            return None
        left = product(rest)
        a, b = ranks_of(left), ranks_of(right)
        columns = [rank for rank in ranks if rank in b and rank not in a]
        inner = [rank for rank in over if rank in a and rank in b]
        if columns and inner and len(inner) == len(over):
            rows = [rank for rank in ranks if rank in a and rank not in b]
            batch = [rank for rank in ranks if rank in a and rank in b]
            return _matmul(frame, left, right, (batch, rows, columns, inner))
    return None


def _matmul(
    frame: Frame, left: Expr, right: Expr, groups: tuple[list[str], list[str], list[str], list[str]]
) -> Value:
    batch, rows, columns, inner = groups
    shape = frame.shape(batch)
    a, b = _dot_operands(frame, left, [*batch, *rows, *inner], right, [*batch, *inner, *columns])
    found = torch.matmul(
        a.reshape([*shape, frame.count(rows), frame.count(inner)]),
        b.reshape([*shape, frame.count(inner), frame.count(columns)]),
    )
    full = (*batch, *rows, *columns)
    return Value(found.reshape(frame.shape(full)), full)


def _dot_operands(
    frame: Frame, left: Expr, order_a: list[str], right: Expr, order_b: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both operands in one type: that of an operand which is a tensor as it stands."""
    a, b = operand(frame, left, order_a), operand(frame, right, order_b)
    dtype = torch.promote_types(a.dtype, b.dtype)
    plain = [t.dtype for t, e in ((a, left), (b, right)) if isinstance(e, Ref)]
    halves = [t for t in plain if t in (torch.float16, torch.bfloat16)]
    dtype = halves[0] if halves else dtype
    return a.to(dtype), b.to(dtype)


def operand(frame: Frame, expr: Expr, order: list[str]) -> torch.Tensor:
    """An expression over all of `order`; a tensor as it stands keeps its type."""
    if isinstance(expr, Ref) and expr.tensor in frame.values:
        tensor = frame.values[expr.tensor].over(order)
        if not tensor.dtype.is_floating_point:
            tensor = tensor.to(frame.dtype)
    else:
        tensor = as_tensor(frame, evaluate(frame, expr, order))
    return tensor.expand(frame.shape(order))
