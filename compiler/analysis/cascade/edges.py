"""Rows in which no key is live: the plan gives what the statements give.

Written out, a row whose maximum is -inf computes -inf - (-inf), so its sums are NaN. A plan subtracts 0
there and its sums are 0. For most outputs 0/0 comes to the same; where it does not (a log-sum-exp
written by hand), the sums are made NaN again before they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...ir.cascade.cascade import Statement, statement
from ...ir.cascade.expr import NAN, Expr, apply, reads, rename_tensors
from ...ir.cascade.plan import OLD, Plan, Reference, State, Step

LIVE = ".live"


def with_dead_rows(plan: Plan) -> Plan:
    """The plan whose finish reads NaN for sums under a reference that is not finite.

    A static reference would hide which rows those are, so none is kept.
    """
    scales = {r.name: r for r in plan.references if r.kind == "scale"}
    used = {read.tensor for item in (*plan.finish, *plan.emit) for read in reads(item.expr)}
    used |= set(plan.outputs)
    rows: list[Statement] = []
    names: dict[str, str] = {}
    for state in plan.states:
        over = [scales[name] for name in state.references if name in scales]
        if not over or state.name not in used:
            continue
        value: Expr = state.ref
        for scale in over:
            value = apply("where", apply("isfinite", scale.ref), value, NAN)
        names[state.name] = f"{state.name}{LIVE}"
        rows.append(statement(names[state.name], state.ranks, value))
    shown = {name: f"{name}.kept" for name in names if name in plan.outputs}
    if shown:
        # The row takes over the output's name, and the state steps aside.
        plan = _renamed(plan, shown)
        rows = [_shown(row, shown) for row in rows]
        names = {name: name if name in shown else row for name, row in names.items()}
    finish = tuple(replace(s, expr=rename_tensors(s.expr, names)) for s in plan.finish)
    emit = tuple(replace(s, expr=rename_tensors(s.expr, names)) for s in plan.emit)
    steps = tuple(replace(s, static=None) if isinstance(s, Reference) else s for s in plan.steps)
    return replace(plan, steps=steps, finish=(*rows, *finish), emit=emit)


def _shown(row: Statement, shown: Mapping[str, str]) -> Statement:
    name = row.name.removesuffix(LIVE)
    if name not in shown:
        return row
    return replace(row, name=name, expr=rename_tensors(row.expr, shown))


def _renamed(plan: Plan, names: Mapping[str, str]) -> Plan:
    """The plan with states renamed in its steps; what finishes reads the old names still."""
    every = {**names, **{f"{name}{OLD}": f"{new}{OLD}" for name, new in names.items()}}
    steps: list[Step] = []
    for step in plan.steps:
        if isinstance(step, State):
            correct = None if step.correct is None else rename_tensors(step.correct, every)
            body = rename_tensors(step.body, every)
            steps.append(
                replace(step, name=names.get(step.name, step.name), body=body, correct=correct)
            )
        elif isinstance(step, Reference):
            guards = tuple(names.get(name, name) for name in step.guards)
            steps.append(replace(step, source=names.get(step.source, step.source), guards=guards))
        else:
            steps.append(replace(step, expr=rename_tensors(step.expr, every)))
    return replace(plan, steps=tuple(steps))
