"""Puts the collected parts together as a plan: what runs per tile, what once, and nothing unused."""

from __future__ import annotations

from dataclasses import replace

from ...ir.cascade.cascade import Cascade, Statement
from ...ir.cascade.expr import Apply, Const, Expr, Size, Virtual, ref, rename_tensors, rewrite, walk
from ...ir.cascade.expr import reads as reads_of
from ...ir.cascade.plan import Plan, Reference, State, Step, needed_steps, step_reads
from .builder import Builder

RUN = ".run"


def assemble(
    builder: Builder,
    before: list[Statement],
    stream: list[Statement],
    emit: list[Statement],
    outputs: tuple[str, ...],
    passes_before: int,
) -> Plan:
    """The plan for `outputs`. Rows that references follow are kept running, the rest is finished once."""
    finish = [item for item in builder.items if isinstance(item, Statement)]
    kept_finish, kept_emit, needed = _needed(finish, emit, outputs)
    used = needed_steps(_steps(builder), needed)
    streamed, _, needed = _needed(stream, [], tuple(needed | set(outputs)))
    once, _, needed = _needed(before, [], tuple(needed | set(outputs)))
    cascade = Cascade(
        builder.cascade.ranks,
        builder.cascade.inputs,
        (*once, *streamed, *kept_finish, *kept_emit),
        (),
        builder.cascade.dead,
    )
    states = [step for step in used if isinstance(step, State)]
    first = bool(states) or (bool(streamed) and not kept_emit)
    inputs = {n: t for n, t in cascade.inputs.items() if n in needed or n in outputs}
    return Plan(
        builder.rank,
        cascade.ranks,
        inputs,
        tuple(once),
        tuple(streamed),
        tuple(used),
        tuple(kept_finish),
        tuple(kept_emit),
        outputs,
        passes_before,
        int(first) + bool(kept_emit),
        cascade.dead,
    )


def _needed(
    items: list[Statement], after: list[Statement], wanted: tuple[str, ...]
) -> tuple[list[Statement], list[Statement], set[str]]:
    """The statements of two lists that `wanted` needs, and all names that are needed then."""
    needed = set(wanted)
    kept: tuple[list[Statement], list[Statement]] = ([], [])
    for which, group in ((1, after), (0, items)):
        for item in reversed(group):
            if item.name in needed:
                kept[which].append(item)
                needed |= {read.tensor for read in reads_of(item.expr)}
    return kept[0][::-1], kept[1][::-1], needed


def _steps(builder: Builder) -> list[Step]:
    """States and references, with running copies of the rows that references follow."""
    sources = {item.source for item in builder.items if isinstance(item, Reference)}
    running: set[str] = set()
    for item in reversed(builder.items):
        if isinstance(item, Statement) and item.name in sources | running:
            running |= {item.name, *step_reads(item)}
    rows = {
        i.name: f"{i.name}{RUN}"
        for i in builder.items
        if isinstance(i, Statement) and i.name in running
    }
    steps: list[Step] = []
    for item in builder.items:
        if isinstance(item, Reference):
            steps.append(replace(item, source=rows.get(item.source, item.source)))
        elif isinstance(item, State):
            steps.append(item)
        elif item.name in rows:
            expr = rename_tensors(item.expr, rows)
            if any(part == Size(builder.rank) for part in walk(expr)):
                expr = _counted(builder, steps, expr)
            steps.append(replace(item, name=rows[item.name], expr=expr))
    return steps


def _counted(builder: Builder, steps: list[Step], expr: Expr) -> Expr:
    """A running mean divides by the coordinates seen so far, not by all of them."""
    rank = builder.rank
    name = "plan.seen"
    if all(step.name != name for step in steps):
        body: Expr = Const(1.0)
        for number in range(builder.cascade.ranks[rank].virtual):
            body = Apply("where", (Virtual(rank, number), Const(0.0), body))
        steps.append(State(name, (), "sum", (rank,), body))
    return rewrite(expr, lambda part: ref(name) if part == Size(rank) else None)
