"""Rows in which no key is live: the plan gives what the statements give.

Written out, a row whose maximum is -inf computes -inf - (-inf), so its sums are NaN. A plan subtracts 0
there and its sums are 0. For most outputs 0/0 comes to the same; where it does not (a log-sum-exp
written by hand), the sums are made NaN again before they are used.
"""

from __future__ import annotations

from dataclasses import replace

from ...ir.cascade.cascade import Statement, statement
from ...ir.cascade.expr import NAN, Expr, apply, reads, rename_tensors
from ...ir.cascade.plan import Plan, Reference

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
    if any(name in names for name in plan.outputs):
        return plan
    finish = tuple(replace(s, expr=rename_tensors(s.expr, names)) for s in plan.finish)
    emit = tuple(replace(s, expr=rename_tensors(s.expr, names)) for s in plan.emit)
    steps = tuple(replace(s, static=None) if isinstance(s, Reference) else s for s in plan.steps)
    return replace(plan, steps=steps, finish=(*rows, *finish), emit=emit)
