"""exp(x - m) as 2 ** (x' - m'), with log2(e) folded into the scale that x has anyway.

    x[s, t] = qk[s, t] * 0.125                  x.two[s, t] = qk[s, t] * 0.1803
    state m[s] = x[s, t] :: max(t)         ->   state m[s] = x.two[s, t] :: max(t)
    state l[s] = exp(x - m.ref) :: sum(t)       state l[s] = 2 ** (x.two - m.ref) :: sum(t)

The hardware's exponential is the one of base two, so this saves a product per score. What reads the
maximum elsewhere reads it times log(2). The result is a plan like any other.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ...ir.cascade.cascade import Statement, statement
from ...ir.cascade.expr import Apply, Const, Expr, Ref, apply, ref, rewrite, walk
from ...ir.cascade.expr import reads as reads_of
from ...ir.cascade.plan import OLD, Plan, Reference, State, Step

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
_LARGEST = 3.4e38
TWO = ".two"
_BASE = Const(2.0)


def in_base_two(plan: Plan) -> Plan:
    """The plan with every exponential that a running maximum stabilises in base two."""
    for reference in plan.references:
        if reference.kind == "scale" and reference.source:
            plan = _turned(plan, reference) or plan
    return plan


def _turned(plan: Plan, reference: Reference) -> Plan | None:
    found = _source(plan, reference)
    if found is None:
        return None
    state, chain = found
    names = {state.name, *chain, reference.name}
    if names & set(plan.outputs) or not isinstance(state.body, (Ref, Apply)):
        return None
    scores = state.body
    steps: list[Step] = []
    two: Expr
    stream = list(plan.stream)
    if isinstance(scores, Ref):
        name = f"{scores.tensor}{TWO}"
        made = next((s for s in stream if s.name == scores.tensor), None)
        two = Ref(name, scores.indices)
        # A map is scaled within; what a reduction or a load gives is scaled after it.
        inner = made.expr if made is not None and made.op is None else scores
        if not _bounded(plan, inner):
            return None
        ranks = made.ranks if made is not None else scores.ranks
        if all(s.name != name for s in stream):
            at = stream.index(made) + 1 if made is not None else 0
            stream.insert(at, statement(name, ranks, times(inner, LOG2E)))
    else:
        if not _bounded(plan, scores):
            return None
        two = times(scores, LOG2E)
    for step in plan.steps:
        turned = _step(step, reference, names, set(chain), state, scores, two)
        if turned is None:
            return None
        steps.append(turned)
    kept = _without_unused(stream, steps, plan)
    finish = tuple(replace(s, expr=_back(s.expr, names)) for s in plan.finish)
    emit = tuple(replace(s, expr=_back(s.expr, names)) for s in plan.emit)
    return replace(plan, stream=kept, steps=tuple(steps), finish=finish, emit=emit)


def _bounded(plan: Plan, expr: Expr) -> bool:
    """Whether the factor cannot overflow a mask: one that is added may hold the least float there is."""
    if isinstance(expr, Apply) and expr.op in ("where", "add", "sub", "max", "min", "neg"):
        return all(_bounded(plan, arg) for arg in expr.args[expr.op == "where" :])
    return not (isinstance(expr, Ref) and plan.rank in expr.ranks and expr.tensor in plan.inputs)


def _source(plan: Plan, reference: Reference) -> tuple[State, list[str]] | None:
    """The maximum that a reference follows, and the rows that only repeat it in between."""
    steps = {step.name: step for step in plan.steps}
    chain: list[str] = []
    at: Step = steps[reference.source]
    while isinstance(at, Statement):
        chain.append(at.name)
        if at.op is not None or not isinstance(at.expr, Ref) or at.expr.tensor not in steps:
            return None
        at = steps[at.expr.tensor]
    if not isinstance(at, State) or at.op != "max" or at.correct is not None:
        return None
    return at, chain


def _step(
    step: Step,
    reference: Reference,
    names: set[str],
    chain: set[str],
    source: State,
    scores: Expr,
    two: Expr,
) -> Step | None:
    if step.name == source.name:
        return replace(source, body=two)
    if step.name == reference.name:
        static = None if reference.static is None else reference.static * LOG2E
        return replace(reference, static=static)
    if isinstance(step, Reference):
        return None if step.source in names else step
    if isinstance(step, Statement):
        return step if step.name in chain else replace(step, expr=_back(step.expr, names))
    new, old = ref(reference.name, *reference.ranks), ref(reference.name + OLD, *reference.ranks)
    body = _exponent(step.body, scores, new, two, new)
    correct = None if step.correct is None else _exponent(step.correct, old, new, old, new)
    for expr in (body, correct):
        # Any other use of the reference has another scale than this knows of.
        if expr is not None and _loose(expr, names, new):
            return None
    return replace(step, body=body, correct=correct)


def _loose(expr: Expr, names: set[str], new: Ref) -> bool:
    """Whether the reference is read outside of powers of two."""
    rest = rewrite(expr, lambda part: Const(0.0) if _is_power(part, new) else None)
    every = names | {name + OLD for name in names}
    return any(read.tensor in every for read in reads_of(rest))


def _is_power(part: Expr, new: Ref) -> bool:
    return isinstance(part, Apply) and part.op == "pow" and part.args[0] == _BASE


def _exponent(expr: Expr, left: Expr, right: Expr, two_left: Expr, two_right: Expr) -> Expr:
    old = apply("exp", apply("sub", left, right))
    new = apply("pow", _BASE, apply("sub", two_left, two_right))
    return rewrite(expr, lambda part: new if part == old else None)


def _back(expr: Expr, names: set[str]) -> Expr:
    """The expression with what is in base two brought back by log(2)."""

    def change(part: Expr) -> Expr | None:
        if isinstance(part, Ref) and part.tensor in names:
            return apply("mul", part, LN2)
        return None

    return rewrite(expr, change)


def _without_unused(
    stream: list[Statement], steps: list[Step], plan: Plan
) -> tuple[Statement, ...]:
    needed = set(plan.outputs)
    for item in plan.emit:
        needed |= {read.tensor for read in reads_of(item.expr)}
    for step in steps:
        if isinstance(step, State):
            needed |= {read.tensor for read in reads_of(step.body)}
    kept: list[Statement] = []
    for item in reversed(stream):
        if item.name in needed:
            kept.append(item)
            needed |= {read.tensor for read in reads_of(item.expr)}
    return tuple(kept[::-1])


def times(expr: Expr, factor: float) -> Expr:
    """expr * factor for a positive factor, with the factor carried to constants where there are any."""
    if isinstance(expr, Const):
        # The least float, written as a mask, must not become -inf: a row of them is still a row.
        scaled = float(expr.value) * factor
        return Const(max(-_LARGEST, min(_LARGEST, scaled)) if abs(scaled) != math.inf else scaled)
    if isinstance(expr, Apply):
        args = expr.args
        if expr.op == "where":
            return apply("where", args[0], times(args[1], factor), times(args[2], factor))
        if expr.op in ("add", "sub", "max", "min"):
            return apply(expr.op, times(args[0], factor), times(args[1], factor))
        if expr.op == "neg":
            return apply("neg", times(args[0], factor))
        for at in (1, 0):
            other = args[at] if expr.op == "mul" else None
            if isinstance(other, Const):
                return apply("mul", args[1 - at], float(other.value) * factor)
        if expr.op == "mul" and any(isinstance(part, Const) for part in walk(args[0])):
            return apply("mul", times(args[0], factor), args[1])
        if expr.op == "div" and isinstance(args[1], Const) and args[1].value:
            return apply("mul", args[0], factor / float(args[1].value))
    return apply("mul", expr, factor)
