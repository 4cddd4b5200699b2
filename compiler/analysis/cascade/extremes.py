"""Maxima and minima under completed reductions: taken of the streamed value, mapped afterwards.

max f(x, r) = f(max x, r) where f rises in x, and f(min x, r) where it falls. A difference x - r is the
common case: the maximum of a softmax's shifted scores needs no correction at all.
"""

from __future__ import annotations

from ...ir.cascade.cascade import Statement, statement
from ...ir.cascade.expr import Apply, Const, Expr, ranks_of, rewrite, walk
from ...ir.cascade.operators import OPERATORS
from ...ir.cascade.printer import print_expr
from .builder import Builder
from .intervals import bounds
from .scope import Kind, RefusedError
from .terms import plus, spine

_OTHER = {"max": "min", "min": "max"}


def fold_extreme(builder: Builder, item: Statement) -> None:
    """Adds the state of a max or min and the row that maps it. Raises RefusedError."""
    expr = builder.scope.inline(item.expr)
    if builder.scope.kind(expr) is Kind.FREE:
        state = builder.state(item.name, str(item.op), item.over, expr, item.ranks)
        if state.name != item.name:
            builder.items.append(statement(item.name, item.ranks, state.ref))
            builder.scope.hoisted[item.name] = state.ref
        return
    expr = _grouped(builder, expr)
    leaf = _leaf(builder, expr)
    slope = _slope(builder, expr, leaf)
    if slope == 0:
        raise builder.normaliser.refuse(expr)
    op = str(item.op) if slope > 0 else _OTHER[str(item.op)]
    rows = ranks_of(rewrite(expr, lambda part: Const(0.0) if part == leaf else None))
    kept = tuple(rank for rank in item.over if rank not in rows)
    left = tuple(rank for rank in item.over if rank in rows)
    ranks = builder.order(ranks_of(leaf) - set(kept), item.ranks)
    state = builder.state(f"{item.name}.{op}", op, kept, leaf, ranks)
    value = rewrite(expr, lambda part: state.ref if part == leaf else None)
    row = statement(item.name, item.ranks, value, item.op if left else None, left)
    if not left:
        builder.scope.hoisted[item.name] = value
    builder.items.append(row)


def _grouped(builder: Builder, expr: Expr) -> Expr:
    """The streamed addends of a sum as one leaf: (a + b) - r for a - r + b."""
    parts = spine(expr)
    if len(parts) < 2 or any(builder.scope.kind(part) is Kind.MIXED for _, part in parts):
        return expr
    total: Expr = Const(0.0)
    for sign, part in parts:
        if not builder.is_row(part):
            total = plus(total, sign, part)
    for sign, part in parts:
        if builder.is_row(part):
            total = plus(total, sign, part)
    return total


def _leaf(builder: Builder, expr: Expr) -> Expr:
    """The one streamed part that is free; more than one cannot be taken through."""
    found: list[Expr] = []

    def collect(part: Expr) -> None:
        if not builder.scope.carries(part):
            return
        if builder.scope.kind(part) is Kind.FREE:
            if part not in found:
                found.append(part)
        elif isinstance(part, Apply):
            for arg in part.args:
                collect(arg)
        else:
            raise builder.normaliser.refuse(part)

    collect(expr)
    if len(found) != 1:
        names = ", ".join(f"`{print_expr(part)}`" for part in found)
        raise RefusedError(
            f"a maximum of `{print_expr(expr)}` depends on completed reductions and on several streamed "
            f"values ({names})",
            expr,
        )
    return found[0]


def _slope(builder: Builder, expr: Expr, leaf: Expr) -> int:
    """+1 where the expression rises with the leaf, -1 where it falls, 0 where that is not known."""
    if expr == leaf:
        return 1
    if not isinstance(expr, Apply):
        return 0
    op = OPERATORS[expr.op]
    inner = [arg for arg in expr.args if leaf in walk(arg)]
    if len(inner) != 1:
        return 0
    below = _slope(builder, inner[0], leaf)
    if op.slope or op.exact:
        return below * (op.slope or 1)
    if expr.op == "add":
        return below
    if expr.op == "sub":
        return below if inner[0] is expr.args[0] else -below
    if expr.op == "mul" or (expr.op == "div" and inner[0] is expr.args[0]):
        other = expr.args[1] if inner[0] is expr.args[0] else expr.args[0]
        return below * bounds(other, builder.cascade, builder.scope.statements).sign
    return 0
