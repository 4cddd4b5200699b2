"""Plans: what `analysis/cascade` derives from a cascade, and all that code generation reads.

A plan streams one rank once. Its contract, for a tile loop, a split or several devices alike:

    before      once, ahead of the loop
    per tile    `stream`, then `steps` in order
    merge(A, B) `steps` in order, without tiles
    after       `finish`, then `emit` over the rank a second time where an output carries it

A step is one of three:

- `State`: new = op(corrected old, reduction of `body` over the tile). `correct` carries an old value from
  the references that it was made under (`x.old`) to the new ones (`x`); None leaves it as it is.
- `Statement`: a running row, computed from the states so far.
- `Reference`: what bodies and corrections subtract, normally its `source` as it stands. Where it is
  `free`, any value gives the same outputs: it may be kept while the source moves little (lazy), or be
  the number `static` from the start, and then the source is not needed.

The streamed rank has at least one coordinate. Edge rules: a reference that is not finite counts as 0, old
or new, in bodies and in corrections; and what is 0 stays 0 under a correction whose factor overflows (a
kernel may cap the factor instead).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .cascade import Cascade, Rank, Statement, Tensor
from .expr import Expr, Ref, reads, ref

OLD = ".old"


@dataclass(frozen=True)
class State:
    """A running reduction over the streamed rank.

    `ranks` are its own; `over` has the streamed rank and whatever else is reduced within a tile.
    `references` names what `body` subtracts; `correct` reads states and references with `.old` for the
    values of the part that is corrected.
    """

    name: str
    ranks: tuple[str, ...]
    op: str
    over: tuple[str, ...]
    body: Expr
    correct: Expr | None = None
    references: tuple[str, ...] = ()

    @property
    def ref(self) -> Ref:
        """A read of the state."""
        return ref(self.name, *self.ranks)


@dataclass(frozen=True)
class Reference:
    """A value that states are kept relative to: a running maximum under exp, or a running mean.

    `kind` is "scale" (subtracted inside exp) or "centre" (subtracted from the streamed value).
    """

    name: str
    ranks: tuple[str, ...]
    source: str
    kind: str
    free: bool = False
    static: float | None = None

    @property
    def ref(self) -> Ref:
        """A read of the reference."""
        return ref(self.name, *self.ranks)


Step = State | Statement | Reference


@dataclass(frozen=True)
class Plan:
    """A cascade folded over `rank`; the module says what each part is for."""

    rank: str
    ranks: Mapping[str, Rank]
    inputs: Mapping[str, Tensor]
    before: tuple[Statement, ...]
    stream: tuple[Statement, ...]
    steps: tuple[Step, ...]
    finish: tuple[Statement, ...]
    emit: tuple[Statement, ...]
    outputs: tuple[str, ...]
    passes_before: int
    passes: int
    dead: str = "as written"

    @property
    def states(self) -> tuple[State, ...]:
        """The states, in the order in which they are updated."""
        return tuple(step for step in self.steps if isinstance(step, State))

    @property
    def references(self) -> tuple[Reference, ...]:
        """The references, in the order in which they are renewed."""
        return tuple(step for step in self.steps if isinstance(step, Reference))

    def ranks_of(self, name: str) -> tuple[str, ...]:
        """The ranks of anything that the plan computes or reads."""
        if name in self.inputs:
            return self.inputs[name].ranks
        everything = [*self.before, *self.stream, *self.steps, *self.finish, *self.emit]
        return next(item.ranks for item in everything if item.name == name)

    def with_static_references(self) -> Plan:
        """The plan with each static reference a number, without the states that only fed it."""
        steps = tuple(
            replace(s, source="") if isinstance(s, Reference) and s.static is not None else s
            for s in self.steps
        )
        needed: set[str] = set(self.outputs)
        for item in [*self.finish, *self.emit]:
            needed |= {read.tensor for read in reads(item.expr)}
        return replace(self, steps=tuple(needed_steps(steps, needed)))


def needed_steps(steps: Sequence[Step], needed: set[str]) -> list[Step]:
    """The steps that give what is needed, in order; adds to `needed` what they read themselves."""
    kept: list[Step] = []
    for step in reversed(steps):
        if step.name in needed:
            kept.append(step)
            needed |= step_reads(step)
    return kept[::-1]


def step_reads(step: Step) -> set[str]:
    """What a step needs, by name, its own old value aside."""
    if isinstance(step, Statement):
        return {read.tensor for read in reads(step.expr)}
    if isinstance(step, Reference):
        return {step.source} - {""}
    found = {read.tensor for read in reads(step.body)} | set(step.references)
    if step.correct is not None:
        found |= {read.tensor.removesuffix(OLD) for read in reads(step.correct)}
    return found - {step.name}


def frame_cascade(plan: Plan) -> Cascade:
    """The plan's ranks and inputs as a cascade without statements, to check inputs against."""
    return Cascade(plan.ranks, plan.inputs, (), (), plan.dead)
