"""Folds a cascade over one rank: `derive` gives plans of one pass each, and says what stood in the way.

Every reduction over the rank that depends on completed ones is rewritten so that it can be kept up to
date while they change. One that cannot is refused, with the factor named; what depends on it then waits
for the next pass, in which it is an input.

Source: FuseMax, section 5 (iterative, one-pass cascades), generalised to any product of factors,
polynomials around a centre, and monotone maxima.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ....errors import IRError
from ...ir.cascade.cascade import Cascade, Statement, Tensor
from ...ir.cascade.expr import reads
from ...ir.cascade.plan import Plan
from ...ir.cascade.printer import print_expr, print_statement
from ...ir.cascade.verifier import verify
from .assemble import assemble
from .builder import Builder
from .extremes import fold_extreme
from .freedom import free_references
from .passes import count_passes, touches
from .scope import Kind, RefusedError, Scope
from .sums import fold_sum


@dataclass(frozen=True)
class Refusal:
    """A reduction that does not fold: its statement, the factor that prevents it, and a sentence."""

    statement: str
    factor: str
    reason: str


@dataclass(frozen=True)
class Folding:
    """What `derive` found: one plan a pass over `rank`, in order, and why there is more than one."""

    rank: str
    plans: tuple[Plan, ...]
    refusals: tuple[Refusal, ...]
    passes_before: int
    passes_after: int

    @property
    def plan(self) -> Plan | None:
        """The plan, where the whole cascade folds into one."""
        return self.plans[0] if len(self.plans) == 1 and not self.refusals else None

    @property
    def reason(self) -> str:
        """Why it takes the passes that it takes; empty where it takes one."""
        if self.refusals:
            return "; ".join(refusal.reason for refusal in self.refusals)
        emitted = [item.name for plan in self.plans for item in plan.emit]
        outputs = [name for plan in self.plans for name in plan.outputs if name in emitted]
        if self.passes_after > 1 and outputs:
            return f"the output {', '.join(outputs)} carries {self.rank} and needs the final statistics"
        return ""


def derive(cascade: Cascade, rank: str) -> Folding:
    """Folds `cascade` over `rank`, without checking the result: `check.py` does, `plans.py` calls both.

    Raises IRError where the cascade breaks a rule of the IR.
    """
    verify(cascade)
    if rank not in cascade.ranks:
        raise IRError(f"{rank!r} is no rank of the cascade, which has {', '.join(cascade.ranks)}")
    before = count_passes(cascade, rank)
    plans: list[Plan] = []
    refusals: list[Refusal] = []
    rest: Cascade | None = cascade.pruned()
    while rest is not None:
        plan, refused, rest = _one_pass(rest, rank, before)
        refusals += refused
        if plan is not None:
            plans.append(plan)
    after = sum(plan.passes for plan in plans)
    return Folding(rank, tuple(plans), tuple(refusals), before, after)


@dataclass
class _Sorted:
    """The statements of a cascade by what they are to one pass."""

    before: list[Statement]
    stream: list[Statement]
    emit: list[Statement]
    waiting: list[Statement]
    refusals: list[Refusal]

    @classmethod
    def empty(cls) -> _Sorted:
        return cls([], [], [], [], [])


def _one_pass(
    cascade: Cascade, rank: str, before: int
) -> tuple[Plan | None, list[Refusal], Cascade | None]:
    scope = Scope(cascade, rank)
    builder = Builder(cascade, scope)
    found = _sort(cascade, builder)
    if found.waiting:
        # What is written along the rank is written in the next pass, which streams it anyhow.
        late = [item for item in found.emit if item.name in cascade.outputs]
        found.waiting += late
    waiting = {item.name for item in found.waiting}
    outputs = [name for name in cascade.outputs if name not in waiting]
    # Rows cross to the next pass; what carries the rank is streamed again.
    crossing = [n for n in _rows_read_later(scope, found) if n not in outputs]
    plan = assemble(builder, found.before, found.stream, found.emit, (*outputs, *crossing), before)
    plan = free_references(plan)
    rest = None
    if found.waiting:
        rest = _next_cascade(cascade, scope, plan.outputs, waiting)
    if not plan.outputs:
        return None, found.refusals, rest
    return plan, found.refusals, rest


def _sort(cascade: Cascade, builder: Builder) -> _Sorted:
    scope, found = builder.scope, _Sorted.empty()
    late: set[str] = set()
    for item in cascade.statements:
        if any(read.tensor in late for read in reads(item.expr)):
            found.waiting.append(item)
            late.add(item.name)
        elif scope.rank in item.over:
            try:
                (fold_sum if item.op == "sum" else fold_extreme)(builder, item)
            except RefusedError as error:
                shown = print_statement(item)
                found.refusals.append(Refusal(shown, print_expr(error.factor), error.reason))
                found.waiting.append(item)
                late.add(item.name)
        elif scope.kind(item.expr) is Kind.ROW:
            builder.items.append(item)
        elif scope.kind(item.expr) is Kind.MIXED:
            found.emit.append(item)
        elif touches(item, scope.rank):
            found.stream.append(item)
        else:
            found.before.append(item)
    return found


def _rows_read_later(scope: Scope, found: _Sorted) -> list[str]:
    """The rows that waiting statements read, themselves or through maps along the rank."""
    waiting = {item.name for item in found.waiting}
    maps = {item.name: item for item in (*found.emit, *found.stream)}
    rows: list[str] = []
    seen: set[str] = set()
    queue = list(found.waiting)
    while queue:
        for read in reads(queue.pop().expr):
            name = read.tensor
            if name in seen or name in waiting:
                continue
            seen.add(name)
            if name in maps:
                queue.append(maps[name])
            elif scope.needs(name):
                rows.append(name)
    return rows


def _next_cascade(
    cascade: Cascade, scope: Scope, computed: tuple[str, ...], waiting: set[str]
) -> Cascade:
    """What is left: rows of this pass become inputs, streamed maps are written again."""
    rows = {n for n in computed if scope.rank not in cascade.ranks_of(n) and n in scope.statements}
    inputs = {**cascade.inputs, **{n: Tensor(n, cascade.ranks_of(n)) for n in rows}}
    statements = tuple(
        item
        for item in cascade.statements
        if item.name not in rows and not (scope.rank in item.over and item.name not in waiting)
    )
    outputs = tuple(name for name in cascade.outputs if name in waiting)
    available = {**inputs}
    kept = []
    for item in statements:
        if all(read.tensor in available for read in reads(item.expr)):
            kept.append(item)
            available[item.name] = Tensor(item.name, item.ranks)
    return replace(cascade, inputs=inputs, statements=tuple(kept), outputs=outputs).pruned()
