"""A plan written as a cascade again, with the tile loop as an iterative rank: the paper's own notation.

    D[i+1, s] = D[i, s] * exp(M_ref[i, s] - M_ref[i+1, s]) + D_tile[i, s]

Counting passes over the loop of this cascade is an independent check of what a plan claims: it is how
FuseMax (section 5) shows FlashAttention-2 to take one.
"""

from __future__ import annotations

from ....errors import IRError
from .cascade import Cascade, Rank, Statement, Tensor
from .expr import Apply, Const, Expr, Index, Pos, Ref, Size, Virtual, apply, rewrite
from .operators import REDUCTIONS
from .plan import OLD, Plan, Reference, State

#: The loop over tiles, and the coordinate inside a tile.
LOOP, INSIDE = "tile", "inside"


def as_tile_loop(plan: Plan) -> Cascade:
    """The cascade of a plan over tiles of one size: inputs [.., t, ..] become [.., tile, inside, ..].

    Raises IRError for a rank with virtual coordinates, which no tiles of one size cover.
    """
    if plan.ranks[plan.rank].virtual:
        raise IRError(f"{plan.rank} has virtual coordinates, so tiles of one size do not cover it")
    return _Writer(plan).write()


class _Writer:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.running = {step.name for step in plan.steps}

    def write(self) -> Cascade:
        plan = self.plan
        ranks = {name: rank for name, rank in plan.ranks.items() if name != plan.rank}
        ranks[LOOP] = Rank(LOOP, "TILES", iterative=True)
        ranks[INSIDE] = Rank(INSIDE, "TILE")
        inputs = {n: Tensor(n, self._split(t.ranks), t.kind) for n, t in plan.inputs.items()}
        statements = [self._plain(item) for item in plan.before]
        statements += [self._start(step) for step in plan.steps if not isinstance(step, Statement)]
        statements += [self._plain(item) for item in plan.stream]
        for step in plan.steps:
            statements += self._step(step)
        statements += [self._plain(item) for item in (*plan.finish, *plan.emit)]
        last = [name for name in plan.outputs if name in self.running]
        for name in last:
            whole = Ref(_name(name), (Index(LOOP, end=True), *map(Index, plan.ranks_of(name))))
            statements.append(Statement(f"{_name(name)}_last", whole.indices[1:], whole))
        outputs = tuple(f"{_name(n)}_last" if n in last else _name(n) for n in plan.outputs)
        return Cascade(ranks, inputs, tuple(statements), outputs, plan.dead)

    def _split(self, ranks: tuple[str, ...]) -> tuple[str, ...]:
        parts = {self.plan.rank: (LOOP, INSIDE)}
        return tuple(part for rank in ranks for part in parts.get(rank, (rank,)))

    def _start(self, step: State | Reference) -> Statement:
        value = REDUCTIONS[step.op][0] if isinstance(step, State) else 0.0
        return Statement(_name(step.name), (Index(), *map(Index, step.ranks)), Const(value))

    def _step(self, step: State | Statement | Reference) -> list[Statement]:
        name, after = _name(step.name), (Index(LOOP, 1), *map(Index, step.ranks))
        if isinstance(step, Statement):
            return [Statement(name, after, self._expr(step.expr, 1), step.op, step.over)]
        if isinstance(step, Reference):
            source: Expr = Const(step.static or 0.0)
            if step.source:
                read = Ref(step.source, tuple(map(Index, step.ranks)))
                now = self._expr(read, 1)
                source = apply("where", apply("isfinite", now), now, 0.0)
            return [Statement(name, after, source)]
        over = self._split(step.over)
        tile = tuple(rank for rank in over if rank != LOOP)
        here = (Index(LOOP), *map(Index, step.ranks))
        part = Statement(f"{name}_tile", here, self._expr(step.body, 1), step.op, tile)
        old: Expr = Ref(name, here)
        if step.correct is not None:
            old = self._expr(step.correct, 1)
        joined = "add" if step.op == "sum" else step.op
        return [part, Statement(name, after, Apply(joined, (old, part.ref)))]

    def _plain(self, item: Statement) -> Statement:
        """A statement outside the recurrence: states are read at the end of the loop."""
        indices = tuple(Index(rank) for rank in self._split(item.ranks))
        return Statement(_name(item.name), indices, self._expr(item.expr, None), item.op, item.over)

    def _expr(self, expr: Expr, offset: int | None) -> Expr:
        """Reads at this step's new values (offset 1) or after the loop (None); `.old` at the step's start."""

        def change(part: Expr) -> Expr | None:
            if isinstance(part, Ref):
                return self._read(part, offset)
            if isinstance(part, Pos) and part.rank == self.plan.rank:
                return apply("add", apply("mul", Pos(LOOP), Size(INSIDE)), Pos(INSIDE))
            if isinstance(part, Size) and part.rank == self.plan.rank:
                return apply("mul", Size(LOOP), Size(INSIDE))
            if isinstance(part, Virtual):
                raise IRError("virtual coordinates in a tile loop")
            return None

        return rewrite(expr, change)

    def _read(self, read: Ref, offset: int | None) -> Ref:
        name = read.tensor.removesuffix(OLD)
        indices = tuple(Index(rank) for rank in self._split(read.ranks))
        if name not in self.running:
            return Ref(_name(name), indices)
        if read.tensor.endswith(OLD):
            return Ref(_name(name), (Index(LOOP), *indices))
        at = Index(LOOP, end=True) if offset is None else Index(LOOP, offset)
        return Ref(_name(name), (at, *indices))


def _name(name: str) -> str:
    return name.replace(".", "_")
