"""Rows in which no key is live: the plan gives what the statements give.

Written out, a row whose maximum is -inf computes -inf - (-inf), so its sums are NaN. A plan subtracts 0
there and its sums are 0. For most outputs 0/0 comes to the same; where it does not (a log-sum-exp
written by hand), a row beside the state is NaN there, and is read in the state's place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...ir.cascade.cascade import Statement, statement
from ...ir.cascade.expr import NAN, Expr, apply, rename_tensors
from ...ir.cascade.plan import OLD, Plan, Reference, State, Step, step_reads

LIVE, KEPT = ".live", ".kept"


def with_dead_rows(plan: Plan) -> Plan:
    """The plan that reads NaN for sums under a reference that is not finite.

    A static reference would hide which rows those are, so none is kept.
    """
    used = {name for item in (*plan.finish, *plan.emit) for name in step_reads(item)}
    for step in plan.steps:
        if not isinstance(step, State):
            used |= step_reads(step)
    poisoned = [s.name for s in plan.states if s.references and s.name in used | set(plan.outputs)]
    # Where the state is an output, the row takes over its name and the state steps aside.
    states = {name: f"{name}{KEPT}" for name in poisoned if name in plan.outputs}
    rows = {name: name if name in states else f"{name}{LIVE}" for name in poisoned}
    references = {reference.name: reference for reference in plan.references}
    steps: list[Step] = []
    for step in plan.steps:
        if not isinstance(step, State):
            steps.append(_read_rows(step, rows))
            continue
        state = _renamed(step, states)
        steps.append(state)
        if step.name in rows:
            value: Expr = state.ref
            for name in step.references:
                value = apply("where", apply("isfinite", references[name].ref), value, NAN)
            steps.append(statement(rows[step.name], step.ranks, value))
    return replace(
        plan,
        steps=tuple(steps),
        finish=tuple(_renamed_reads(item, rows) for item in plan.finish),
        emit=tuple(_renamed_reads(item, rows) for item in plan.emit),
    )


def _renamed_reads(item: Statement, names: Mapping[str, str]) -> Statement:
    return replace(item, expr=rename_tensors(item.expr, names))


def _read_rows(step: Statement | Reference, rows: Mapping[str, str]) -> Statement | Reference:
    if isinstance(step, Statement):
        return _renamed_reads(step, rows)
    return replace(step, source=rows.get(step.source, step.source), static=None)


def _renamed(state: State, names: Mapping[str, str]) -> State:
    """A state under its new name, reading others under theirs."""
    every = {**names, **{f"{name}{OLD}": f"{new}{OLD}" for name, new in names.items()}}
    correct = None if state.correct is None else rename_tensors(state.correct, every)
    body = rename_tensors(state.body, every)
    return replace(state, name=names.get(state.name, state.name), body=body, correct=correct)
