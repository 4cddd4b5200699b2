"""Which references only stabilise, and what bounds they have.

A reference m of exponentials is free when no output depends on it: with the states put as S exp(-m),
the derivative of every output by m is zero. Then any value may stand for it, so it may lag behind (lazy
rescaling), and where the form of the scores bounds them (a softcap) it may be a constant.
"""

from __future__ import annotations

from dataclasses import replace

from ...ir.cascade.cascade import Cascade, Statement
from ...ir.cascade.expr import Apply, Expr, ref, rename_tensors, walk
from ...ir.cascade.plan import Plan, Reference, Step
from .assemble import RUN
from .intervals import Interval, bounds
from .symbolic import is_free_of

#: exp must neither overflow nor lose whole rows in float32 at this distance from a fixed reference.
_REACH = 60.0


def free_references(plan: Plan) -> Plan:
    """The plan with its free references marked, its finish written with them, and static values set."""
    for reference in plan.references:
        if reference.kind == "scale":
            changed = _with_free(plan, reference)
            if changed is not None:
                plan = changed
    return plan


def _with_free(plan: Plan, reference: Reference) -> Plan | None:
    """The plan that reads the reference where it read the source, if no output can tell."""
    names = {reference.source.removesuffix(RUN): reference.name, reference.source: reference.name}
    finish = tuple(_renamed(item, names) for item in plan.finish if item.name not in names)
    emit = tuple(_renamed(item, names) for item in plan.emit)
    steps: list[Step] = []
    seen = False
    for step in plan.steps:
        if isinstance(step, Statement) and seen:
            steps.append(_renamed(step, names))
        else:
            steps.append(step)
        seen = seen or step.name == reference.name
    if any(name in names for name in plan.outputs):
        return None
    scaled = {state.name for state in plan.states if reference.name in state.references}
    rows = [step for step in steps if isinstance(step, Statement)]
    # Other references are trusted to end at the final value of their sources: those must not move either.
    others = [other.source for other in plan.references if other is not reference]
    if not is_free_of(reference, scaled, [*rows, *finish, *emit], [*plan.outputs, *others]):
        return None
    free = replace(reference, free=True, static=static_value(plan, reference))
    steps = [free if step is reference else step for step in steps]
    return replace(plan, steps=tuple(steps), finish=finish, emit=emit)


def _renamed(item: Statement, names: dict[str, str]) -> Statement:
    return replace(item, expr=rename_tensors(item.expr, names))


def static_value(plan: Plan, reference: Reference) -> float | None:
    """The middle of the bounds of everything under exp with this reference, where they are close."""
    cascade = Cascade(plan.ranks, plan.inputs, (), ())
    statements = {item.name: item for item in (*plan.before, *plan.stream)}
    found: list[Interval] = []
    for state in plan.states:
        for part in walk(state.body):
            if _is_exp_of(part, reference):
                assert isinstance(part, Apply) and isinstance(part.args[0], Apply)
                if part.args[0].op != "sub":
                    return None
                found.append(bounds(part.args[0].args[0], cascade, statements))
    low, high = min((i.low for i in found), default=0), max((i.high for i in found), default=0)
    if not found or not 0 <= high - low <= 2 * _REACH:
        return None
    return (low + high) / 2


def _is_exp_of(part: Expr, reference: Reference) -> bool:
    if not isinstance(part, Apply) or part.op != "exp":
        return False
    inside = part.args[0]
    return isinstance(inside, Apply) and inside.args[-1] == ref(reference.name, *reference.ranks)
