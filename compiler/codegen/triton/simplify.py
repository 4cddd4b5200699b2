"""Plans without what a kernel would compute twice.

A graph that returns a log-sum-exp beside its softmax follows the same maximum twice, the second time as
`where(abs(m) == inf, 0, m)`. Bodies and corrections read 0 for a reference that is not finite, so both
are the same reference, and the sums under them the same sum.

    row top.run[s] = where(abs(m[s]) == inf, 0, m[s])
    reference top.ref[s] follows top.run scale                 ->   (m.ref, which there is already)
    state sum_1[s] = exp(x[s, t] - top.ref[s]) :: sum(t)       ->   (sum_0, which there is already)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from ...ir.cascade.cascade import Statement, statement
from ...ir.cascade.expr import Apply, Const, Expr, Ref, rename_tensors, without_constants
from ...ir.cascade.plan import OLD, Plan, Reference, State, Step, step_reads


def simplified(plan: Plan) -> Plan:
    """The plan with equal references and equal states computed once, and constants before it runs."""
    return _without_equal_states(_without_twins(_without_constants(plan)))


def _without_constants(plan: Plan) -> Plan:
    """Sizes that a graph has fixed leave tests that are always true, and sums of numbers: no types there."""

    def rows(items: Iterable[Statement]) -> tuple[Statement, ...]:
        return tuple(replace(item, expr=without_constants(item.expr)) for item in items)

    def step(item: Step) -> Step:
        if isinstance(item, Statement):
            return rows([item])[0]
        if isinstance(item, Reference):
            return item
        correct = None if item.correct is None else without_constants(item.correct)
        return replace(item, body=without_constants(item.body), correct=correct)

    return replace(
        plan,
        before=rows(plan.before),
        stream=rows(plan.stream),
        steps=tuple(step(item) for item in plan.steps),
        finish=rows(plan.finish),
        emit=rows(plan.emit),
    )


def _without_twins(plan: Plan) -> Plan:
    """Scale references that follow one state as one reference, which follows the state itself."""
    steps = {step.name: step for step in plan.steps}
    rows = [step for step in plan.steps if isinstance(step, Statement)]
    running = {name for row in rows for name in step_reads(row)}
    firsts: dict[str, Reference] = {}
    names: dict[str, str] = {}
    shown: dict[str, Statement] = {}
    for reference in plan.references:
        if reference.kind != "scale" or not reference.source or reference.name in running:
            continue
        root, zeroed = _root(reference.source, steps)
        first = firsts.setdefault(root, replace(reference, source=root))
        if first.ranks != reference.ranks or not (zeroed or first.name != reference.name):
            continue
        names[reference.name] = first.name
        value: Expr = Ref(root, reference.ref.indices)
        if zeroed:
            test = Apply("eq", (Apply("abs", (value,)), Const(math.inf)))
            value = Apply("where", (test, Const(0.0), value))
        shown[reference.name] = statement(f"{reference.name}.shown", reference.ranks, value)
    if not names:
        return plan
    every = {**names, **{name + OLD: first + OLD for name, first in names.items()}}
    kept: list[Step] = []
    for step in plan.steps:
        if isinstance(step, Reference) and step.name in names:
            if names[step.name] != step.name:
                continue
            step = next(first for first in firsts.values() if first.name == step.name)
        elif isinstance(step, State):
            correct = None if step.correct is None else rename_tensors(step.correct, every)
            under = tuple(dict.fromkeys(names.get(name, name) for name in step.references))
            body = rename_tensors(step.body, every)
            step = replace(step, body=body, correct=correct, references=under)
        kept.append(step)
    # What follows the stream reads the value that the reference had, 0 where its source is not finite.
    late = {name: row.name for name, row in shown.items()}
    finish = [replace(s, expr=rename_tensors(s.expr, late)) for s in plan.finish]
    emit = tuple(replace(s, expr=rename_tensors(s.expr, late)) for s in plan.emit)
    return _pruned(replace(plan, steps=tuple(kept), finish=(*shown.values(), *finish), emit=emit))


def _root(name: str, steps: dict[str, Step]) -> tuple[str, bool]:
    """The state that rows repeat, and whether one of them puts 0 for what is not finite."""
    zeroed = False
    while isinstance(item := steps.get(name), Statement):
        expr: Expr = item.expr
        inner = _zeroed(expr)
        if inner is not None:
            zeroed, expr = True, inner
        if not isinstance(expr, Ref) or expr.ranks != item.ranks:
            break
        name = expr.tensor
    return name, zeroed


def _zeroed(expr: Expr) -> Expr | None:
    """m of `where(abs(m) == inf, 0, m)`."""
    if not isinstance(expr, Apply) or expr.op != "where":
        return None
    test, yes, no = expr.args
    same = isinstance(test, Apply) and test.op == "eq" and test.args[0] == Apply("abs", (no,))
    if (
        same
        and isinstance(test, Apply)
        and test.args[1] == Const(float("inf"))
        and yes == Const(0.0)
    ):
        return no
    return None


def _without_equal_states(plan: Plan) -> Plan:
    made: dict[tuple[object, ...], str] = {}
    names: dict[str, str] = {}
    steps: list[Step] = []
    for step in plan.steps:
        every = {**names, **{name + OLD: new + OLD for name, new in names.items()}}
        if isinstance(step, Reference):
            step = replace(step, source=names.get(step.source, step.source))
        elif isinstance(step, Statement):
            step = replace(step, expr=rename_tensors(step.expr, every))
        else:
            own = {step.name: "", step.name + OLD: OLD}
            body = rename_tensors(step.body, every)
            correct = None if step.correct is None else rename_tensors(step.correct, every)
            plain = None if correct is None else rename_tensors(correct, own)
            key = (step.ranks, step.op, step.over, body, plain, step.references)
            if key in made:
                names[step.name] = made[key]
                continue
            made[key] = step.name
            step = replace(step, body=body, correct=correct)
        steps.append(step)
    if not names:
        return plan
    finish = [replace(s, expr=rename_tensors(s.expr, names)) for s in plan.finish]
    shown = [
        statement(name, plan.ranks_of(name), Ref(names[name], step.ref.indices))
        for name in plan.outputs
        if name in names
        for step in plan.steps
        if step.name == name and isinstance(step, State)
    ]
    emit = tuple(replace(s, expr=rename_tensors(s.expr, names)) for s in plan.emit)
    return _pruned(replace(plan, steps=tuple(steps), finish=(*shown, *finish), emit=emit))


def _pruned(plan: Plan) -> Plan:
    """The plan without steps and rows that nothing reads."""
    needed = set(plan.outputs)
    emit = _kept(list(plan.emit), needed)
    finish = _kept(list(plan.finish), needed)
    steps: list[Step] = []
    for step in reversed(plan.steps):
        if step.name in needed:
            steps.append(step)
            needed |= step_reads(step)
    return replace(plan, steps=tuple(steps[::-1]), finish=tuple(finish), emit=tuple(emit))


def _kept(items: list[Statement], needed: set[str]) -> list[Statement]:
    kept: list[Statement] = []
    for item in reversed(items):
        if item.name in needed:
            kept.append(item)
            needed |= step_reads(item)
    return kept[::-1]
