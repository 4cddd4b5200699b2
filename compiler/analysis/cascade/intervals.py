"""Bounds of expressions from their form alone: inputs may be anything, tanh lies in [-1, 1].

What a softcap bounds needs no running maximum. Values that a mask removes altogether (-inf) are left
out of the bounds and remembered, since exp turns them to 0 under any reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...ir.cascade.cascade import Cascade, Statement
from ...ir.cascade.expr import Apply, Const, Expr, Pos, Ref, Size, Virtual
from ...ir.cascade.operators import OPERATORS

INF = math.inf


@dataclass(frozen=True)
class Interval:
    """low <= value <= high; `removed` says that the value may also be -inf."""

    low: float = -INF
    high: float = INF
    removed: bool = False

    @property
    def sign(self) -> int:
        """+1 where the value is nowhere negative, -1 where nowhere positive, else 0."""
        if self.low >= 0 and not self.removed:
            return 1
        return -1 if self.high <= 0 else 0


ANY = Interval()


def bounds(expr: Expr, cascade: Cascade, statements: Mapping[str, Statement]) -> Interval:
    """An interval that holds every value of the expression."""

    def of(part: Expr) -> Interval:
        if isinstance(part, Const):
            value = float(part.value)
            return Interval(INF, -INF, True) if value == -INF else Interval(value, value)
        if isinstance(part, (Pos, Size)):
            return Interval(0.0, INF)
        if isinstance(part, Virtual):
            return Interval(0.0, 1.0)
        if isinstance(part, Ref):
            if part.tensor in cascade.inputs:
                is_bool = cascade.inputs[part.tensor].kind == "bool"
                return Interval(0.0, 1.0) if is_bool else ANY
            item = statements.get(part.tensor)
            return ANY if item is None else _reduced(item, of)
        return _apply(part, [of(arg) for arg in part.args])

    return of(expr)


def _reduced(item: Statement, of: Callable[[Expr], Interval]) -> Interval:
    inside = of(item.expr)
    if item.op != "sum":
        return inside
    if inside.removed:
        return ANY
    return Interval(0.0 if inside.low >= 0 else -INF, 0.0 if inside.high <= 0 else INF)


def _apply(expr: Apply, args: list[Interval]) -> Interval:
    op = expr.op
    if op == "where":
        yes, no = args[1], args[2]
        low, high = min(yes.low, no.low), max(yes.high, no.high)
        return Interval(low, high, yes.removed or no.removed)
    if OPERATORS[op].truth:
        return Interval(0.0, 1.0)
    if OPERATORS[op].exact:
        return args[0]
    rule = _RULES.get(op)
    if rule is None or any(a.low > a.high for a in args):
        return ANY
    found = rule(*args)
    return Interval(found.low, found.high, found.removed)


def _add(a: Interval, b: Interval) -> Interval:
    return Interval(a.low + b.low, a.high + b.high, a.removed or b.removed)


def _neg(a: Interval) -> Interval:
    return ANY if a.removed else Interval(-a.high, -a.low)


def _mul(a: Interval, b: Interval) -> Interval:
    if a.removed or b.removed:
        positive = (a if b.removed else b).low > 0
        if not positive or (a.removed and b.removed):
            return ANY
    corners = [_times(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    return Interval(min(corners), max(corners), a.removed or b.removed)


def _times(x: float, y: float) -> float:
    return 0.0 if x == 0 or y == 0 else x * y


def _div(a: Interval, b: Interval) -> Interval:
    if b.low > 0:
        return _mul(a, Interval(1 / b.high, 1 / b.low))
    if b.high < 0:
        return _mul(a, Interval(1 / b.high, 1 / b.low))
    if b.low == 0 and not b.removed:
        return Interval(0.0 if a.low >= 0 else -INF, 0.0 if a.high <= 0 else INF, a.removed)
    return ANY


def _monotone(
    function: Callable[[float], float], at_removed: float
) -> Callable[[Interval], Interval]:
    def rule(a: Interval) -> Interval:
        low = min(function(a.low), at_removed) if a.removed else function(a.low)
        return Interval(low, function(a.high))

    return rule


def _exp(x: float) -> float:
    return INF if x > 700 else math.exp(x)


def _even(a: Interval) -> Interval:
    return Interval(
        0.0 if a.low <= 0 <= a.high else min(abs(a.low), abs(a.high)), max(-a.low, a.high)
    )


def _pow(a: Interval, b: Interval) -> Interval:
    if b.low != b.high:
        return Interval(0.0, INF) if a.sign > 0 else ANY
    if b.low == 2:
        return Interval(0.0, INF) if a.removed else _mul(_even(a), _even(a))
    return Interval(0.0, INF) if a.sign > 0 or b.low % 2 == 0 else ANY


_RULES: dict[str, Callable[..., Interval]] = {
    "add": _add,
    "sub": lambda a, b: ANY if b.removed else _add(a, _neg(b)),
    "neg": _neg,
    "mul": _mul,
    "div": _div,
    "pow": _pow,
    "exp": _monotone(_exp, 0.0),
    "tanh": _monotone(math.tanh, -1.0),
    "sigmoid": _monotone(lambda x: 1 / (1 + _exp(-x)), 0.0),
    "relu": _monotone(lambda x: max(x, 0.0), 0.0),
    "softplus": _monotone(lambda x: x if x > 30 else math.log1p(_exp(x)), 0.0),
    "sqrt": _monotone(lambda x: math.sqrt(max(x, 0.0)), 0.0),
    "abs": lambda a: Interval(0.0, INF) if a.removed else _even(a),
    "sin": lambda a: Interval(-1.0, 1.0),
    "cos": lambda a: Interval(-1.0, 1.0),
    "erf": lambda a: Interval(-1.0, 1.0),
    "sign": lambda a: Interval(-1.0, 1.0),
    "max": lambda a, b: (
        Interval(max(a.low, b.low), max(a.high, b.high), a.removed and b.removed)
        if not (a.removed or b.removed)
        else Interval(min(a.low, b.low), max(a.high, b.high), True)
    ),
    "min": lambda a, b: Interval(min(a.low, b.low), min(a.high, b.high), a.removed or b.removed),
}
