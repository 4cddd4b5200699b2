"""When does a streamed coordinate count at all? What masks say, read off the plan's expressions.

A body is gated where it is the identity of its reduction: -inf under a max, 0 under a sum. From that
come the tensor at which coordinates past the end are hidden, and the bounds on `pos(t)` outside of
which a whole tile may be skipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ...ir.cascade.cascade import Statement
from ...ir.cascade.expr import (
    Apply,
    Const,
    Expr,
    Pos,
    Ref,
    Size,
    Virtual,
    add,
    apply,
    reads,
    sub,
    walk,
    without_constants,
)
from ...ir.cascade.plan import Plan, State

#: A mask at or below this is meant to remove: no score comes near it.
_REMOVES = -1e20


@dataclass(frozen=True)
class Bound:
    """pos(stream) <= `value`, or >= where it is no `upper` one; `value` is integral, without the stream.

    `finite` says that the mask behind it is a number: it removes only in rows that have a live key.
    """

    value: Expr
    upper: bool
    finite: bool


def hiding_place(plan: Plan) -> str | None:
    """The streamed tensor whose coordinates, set to -inf, leave every state as it is."""
    statements = {item.name: item for item in plan.stream}
    for item in reversed(plan.stream):
        if all(
            _killed(state.body, item.name, -math.inf if state.op == "max" else 0.0, statements)
            for state in plan.states
            if state.op != "min"
        ) and all(state.op != "min" for state in plan.states):
            return item.name
    return None


def _killed(expr: Expr, name: str, target: float, known: Mapping[str, Statement]) -> bool:
    """Whether the expression is `target` wherever tensor `name` is -inf."""
    if isinstance(expr, Const):
        return float(expr.value) == target
    if isinstance(expr, Ref):
        if expr.tensor == name:
            return target == -math.inf
        item = known.get(expr.tensor)
        return item is not None and item.op is None and _killed(item.expr, name, target, known)
    if not isinstance(expr, Apply):
        return False
    args = expr.args
    if expr.op == "where":
        return all(_killed(arg, name, target, known) for arg in args[1:])
    if target == 0.0:
        return _killed_to_zero(expr, name, known)
    if expr.op in ("add", "sub"):
        return _killed(args[0], name, target, known) and not _reads(args[1], name, known)
    if expr.op == "mul" and isinstance(args[1], Const) and float(args[1].value) > 0:
        return _killed(args[0], name, target, known)
    return False


def _killed_to_zero(expr: Apply, name: str, known: Mapping[str, Statement]) -> bool:
    args = expr.args
    if expr.op in ("exp", "relu", "sigmoid"):
        return _killed(args[0], name, -math.inf, known)
    if expr.op == "pow" and args[0] == Const(2.0):
        return _killed(args[1], name, -math.inf, known)
    if expr.op == "mul":
        # 0 * -inf is NaN: the other factor must not see the tensor at all.
        return any(
            _killed(args[at], name, 0.0, known) and not _reads(args[1 - at], name, known)
            for at in (0, 1)
        )
    if expr.op == "div":
        return _killed(args[0], name, 0.0, known) and not _reads(args[1], name, known)
    return False


def _reads(expr: Expr, name: str, known: Mapping[str, Statement]) -> bool:
    return any(
        read.tensor == name
        or (read.tensor in known and _reads(known[read.tensor].expr, name, known))
        for read in reads(expr)
    )


def bounds(plan: Plan) -> list[Bound]:
    """Bounds on `pos` of the streamed rank that hold wherever a real coordinate counts for any state."""
    statements = {item.name: item for item in plan.stream}
    found: list[Bound] | None = None
    for state in plan.states:
        mine = _gates(_target(state), state.body, plan, statements)
        found = mine if found is None else [bound for bound in found if bound in mine]
    return list(dict.fromkeys(found or []))


def _target(state: State) -> float:
    return {"max": -math.inf, "min": math.inf}.get(state.op, 0.0)


def _gates(target: float, expr: Expr, plan: Plan, known: Mapping[str, Statement]) -> list[Bound]:
    """Bounds that hold wherever the expression is anything but `target`."""
    if isinstance(expr, Ref):
        item = known.get(expr.tensor)
        if item is None or (item.op is not None and (item.op != "sum" or target != 0.0)):
            return []
        return _gates(target, item.expr, plan, known)
    if not isinstance(expr, Apply):
        return []
    args = expr.args
    if expr.op == "where":
        return _selected(target, expr, plan, known)
    if expr.op in ("f32", "f64", "f16", "bf16", "neg") and (expr.op != "neg" or target == 0.0):
        return _gates(target, args[0], plan, known)
    if target == 0.0:
        if expr.op == "mul":
            return [bound for arg in args for bound in _gates(0.0, arg, plan, known)]
        if expr.op in ("exp", "sigmoid", "relu"):
            return _gates(-math.inf, args[0], plan, known)
        if expr.op == "pow" and args[0] == Const(2.0):
            return _gates(-math.inf, args[1], plan, known)
        return _gates(0.0, args[0], plan, known) if expr.op == "div" else []
    if expr.op == "add":
        return [bound for arg in args for bound in _gates(target, arg, plan, known)]
    if expr.op == "sub":
        return _gates(target, args[0], plan, known)
    positive = expr.op == "mul" and isinstance(args[1], Const) and float(args[1].value) > 0
    return _gates(target, args[0], plan, known) if positive else []


def _selected(
    target: float, expr: Apply, plan: Plan, known: Mapping[str, Statement]
) -> list[Bound]:
    test, yes, no = expr.args
    if isinstance(test, Virtual) and test.rank == plan.rank:
        return _gates(target, no, plan, known)
    if _is_target(yes, target):
        finite = yes != Const(target)
        return _necessary(apply("not", test), plan, finite) + _gates(target, no, plan, known)
    if _is_target(no, target):
        finite = no != Const(target)
        return _necessary(test, plan, finite) + _gates(target, yes, plan, known)
    other = _gates(target, no, plan, known)
    return [bound for bound in _gates(target, yes, plan, known) if bound in other]


def _is_target(expr: Expr, target: float) -> bool:
    if not isinstance(expr, Const):
        return False
    value = float(expr.value)
    return value == target or (target == -math.inf and value <= _REMOVES)


def _necessary(test: Expr, plan: Plan, finite: bool) -> list[Bound]:
    """Bounds that hold wherever the test is true."""
    if not isinstance(test, Apply):
        return []
    if test.op == "and":
        return [b for arg in test.args for b in _necessary(arg, plan, finite)]
    if test.op == "not" and isinstance(test.args[0], Apply):
        inner = test.args[0]
        if inner.op == "not":
            return _necessary(inner.args[0], plan, finite)
        if inner.op == "or":
            return [b for arg in inner.args for b in _necessary(apply("not", arg), plan, finite)]
        turned = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "ne": "eq"}.get(inner.op)
        return _necessary(Apply(turned, inner.args), plan, finite) if turned else []
    if test.op not in ("lt", "le", "gt", "ge", "eq"):
        return []
    line = _line(sub(*test.args), plan)
    if line is None or line[0] not in (1, -1):
        return []
    return _solved(test.op, *line, finite)


def _solved(op: str, slope: int, rest: Expr, finite: bool) -> list[Bound]:
    """slope * pos + rest `op` 0, solved for pos."""
    value = apply("neg", rest) if slope > 0 else rest
    if op == "eq":
        value = without_constants(value)
        return [Bound(value, True, finite), Bound(value, False, finite)]
    upper = (op in ("lt", "le")) == (slope > 0)
    step = {"lt": -1.0, "le": 0.0, "gt": -1.0, "ge": 0.0}[op] * (1 if upper else -1)
    return [Bound(without_constants(add(value, Const(step))), upper, finite)]


def _line(expr: Expr, plan: Plan) -> tuple[int, Expr] | None:
    """(slope, rest) of an integral expression that is slope * pos(stream) + rest."""
    if isinstance(expr, Pos):
        return (1, Const(0.0)) if expr.rank == plan.rank else (0, expr)
    if isinstance(expr, Size):
        return 0, expr
    if isinstance(expr, Const):
        return (0, expr) if float(expr.value).is_integer() else None
    if isinstance(expr, Ref):
        tensor = plan.inputs.get(expr.tensor)
        plain = tensor is not None and tensor.kind == "integer" and plan.rank not in tensor.ranks
        return (0, expr) if plain else None
    if not isinstance(expr, Apply):
        return None
    lines = [_line(arg, plan) for arg in expr.args]
    if any(line is None for line in lines):
        return None
    parts = [line for line in lines if line is not None]
    if expr.op == "neg":
        return -parts[0][0], apply("neg", parts[0][1])
    if expr.op == "add":
        return parts[0][0] + parts[1][0], add(parts[0][1], parts[1][1])
    if expr.op == "sub":
        return parts[0][0] - parts[1][0], sub(parts[0][1], parts[1][1])
    if expr.op == "mul" and all(part[0] == 0 for part in parts):
        return 0, expr
    return None


def reads_inputs(expr: Expr) -> bool:
    """Whether a bound needs a tensor to be known."""
    return any(isinstance(part, Ref) for part in walk(expr))
