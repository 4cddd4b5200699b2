"""What each rank of a plan becomes in a kernel.

    grid     one coordinate a program: batch, KV head
    rows     packed into the rows of a tile: queries, and the query heads that share a KV head
    stream   the plan's rank, walked tile by tile
    lanes    whole within a tile: head size, value size; a walked one in steps, in a loop within the tile

Rows are what no streamed matrix carries: each of their coordinates needs the same keys and values, so
one tile of those serves them all. Statements that would be computed again for every row tile, and
products of two lanes, are left to torch ahead of the kernel; what finishes across rows, after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ....errors import UnsupportedError
from ...ir.cascade.cascade import Statement, Tensor
from ...ir.cascade.expr import Expr, Pos, ranks_of, reads, walk
from ...ir.cascade.plan import Plan, Reference, State

ROW, STREAM = "row", "stream"
#: Coordinates of a walked rank that a tile has at a time.
STEP = 16
#: Most lanes that a tile has whole.
LANES = 512


@dataclass(frozen=True)
class Roles:
    """Ranks by what they become, rows from the slowest to the fastest; `walked` are among the lanes."""

    stream: str
    grid: tuple[str, ...]
    rows: tuple[str, ...]
    lanes: tuple[str, ...]
    walked: tuple[str, ...] = ()

    def axis(self, rank: str) -> str | None:
        """The axis of a tile along which a rank varies; None for the grid's."""
        if rank == self.stream:
            return STREAM
        if rank in self.rows:
            return ROW
        return rank if rank in self.lanes else None

    def axes(self, ranks: Iterable[str]) -> tuple[str, ...]:
        """The axes of a value over ranks, in the order in which tiles have them."""
        found = {self.axis(rank) for rank in ranks} - {None}
        return tuple(axis for axis in (ROW, STREAM, *self.lanes) if axis in found)

    def walk(self, item: Statement) -> str:
        """The walked rank that a statement sums over, or nothing."""
        return next((rank for rank in item.over if rank in self.walked), "")

    def knows(self, ranks: Iterable[str]) -> bool:
        """Whether a tile has all of these ranks."""
        return set(ranks) <= {self.stream, *self.grid, *self.rows, *self.lanes}


@dataclass(frozen=True)
class Division:
    """A plan cut in three: `ahead` and `after` for torch, `plan` for the kernel."""

    plan: Plan
    roles: Roles
    ahead: tuple[Statement, ...]
    after: tuple[Statement, ...]
    outputs: tuple[str, ...]


def divide(plan: Plan, sizes: Mapping[str, int], walked: Sequence[str] = ()) -> Division:
    """What of the plan the kernel computes, and the roles of its ranks; `walked` as in `generate`.

    Raises UnsupportedError where ranks fit no role.
    """
    ahead: list[Statement] = []
    inner, roles = _hoisted(plan, ahead, frozenset(walked))
    inner = _before(inner, roles, ahead)
    finish: list[Statement] = []
    after: list[Statement] = []
    for item in inner.finish:
        late = {s.name for s in after} & {read.tensor for read in reads(item.expr)}
        (finish if _fits(item, roles) and not late else after).append(item)
    if plan.emit:
        after += [*plan.stream, *plan.emit]
    made = {step.name for step in inner.steps} | {item.name for item in finish}
    wanted = set(plan.outputs) | {read.tensor for item in after for read in reads(item.expr)}
    outputs = tuple(sorted(made & wanted, key=lambda name: (name not in plan.outputs, name)))
    inner = replace(inner, finish=tuple(finish), emit=())
    _check(inner, roles, sizes)
    return Division(inner, roles, tuple(ahead), tuple(after), outputs)


def _as_input(plan: Plan, item: Statement) -> Plan:
    inputs = {**plan.inputs, item.name: Tensor(item.name, item.ranks)}
    return replace(
        plan,
        inputs=inputs,
        before=tuple(s for s in plan.before if s is not item),
        stream=tuple(s for s in plan.stream if s is not item),
    )


def _hoisted(plan: Plan, ahead: list[Statement], walked: frozenset[str]) -> tuple[Plan, Roles]:
    """The plan without streamed products that each row tile would repeat."""
    while True:
        roles = _roles(plan, walked)
        item = next((s for s in plan.stream if _repeats(s, plan, roles)), None)
        if item is None and not roles.rows:
            item = _obstacle(plan, walked)
        if item is None:
            return plan, roles
        plan = _hoist(plan, item, ahead)


def _hoist(plan: Plan, item: Statement, ahead: list[Statement]) -> Plan:
    """The plan with a statement, and all that it reads, computed ahead."""
    for read in reads(item.expr):
        needed = next((s for s in (*plan.before, *plan.stream) if s.name == read.tensor), None)
        if needed is not None:
            plan = _hoist(plan, needed, ahead)
    ahead.append(item)
    return _as_input(plan, item)


def _repeats(item: Statement, plan: Plan, roles: Roles) -> bool:
    """A product with a result along lanes and none along rows: a projection of the keys, say.

    One that is walked is meant to be repeated: what is made ahead would be as large as the keys.
    """
    kept = set(item.ranks) & set(roles.lanes)
    if roles.walk(item):
        return False
    return bool(item.over) and bool(kept) and not set(item.ranks) & set(roles.rows)


def _obstacle(plan: Plan, walked: frozenset[str]) -> Statement | None:
    """The reduction whose streamed operand keeps the plan from having rows."""
    for item in plan.stream:
        if item.over and _roles(_hoist(plan, item, []), walked).rows:
            return item
    return None


def _roles(plan: Plan, walked: frozenset[str]) -> Roles:
    stream = plan.rank
    # What a maximum stands for is a row; without one, what a streamed product has beside the stream.
    made = {r for x in plan.references if x.kind == "scale" for r in x.ranks}
    made = made or {r for s in plan.stream if s.over for r in s.ranks} - {stream}
    reduced = {r for s in plan.stream for r in s.over}
    reduced |= {r for s in plan.states for r in s.over} - {stream}
    streamed = _streamed_inputs(plan)
    state_ranks = dict.fromkeys(r for s in plan.states for r in s.ranks)
    if not made:
        shared = set.intersection(*(set(x) for x in streamed.values())) if streamed else set()
        made = shared - {stream}
    carried = {rank for ranks in streamed.values() for rank in ranks}
    carried |= {r for s in plan.stream if s.over for r in s.ranks}
    lanes = [r for r in plan.ranks if r in reduced]
    lanes += [r for r in state_ranks if r in carried and r not in made and r not in lanes]
    rest = [
        r for r in plan.ranks if r in made | set(state_ranks) and r not in lanes and r != stream
    ]
    matrices = [set(ranks) for ranks in streamed.values() if set(ranks) & set(lanes)]
    # What is made of a walked rank is a matrix too, though nothing streams it.
    made_here = [set(s.ranks) for s in plan.stream if set(s.over) & walked]
    matrices += [ranks for ranks in made_here if ranks & set(lanes)]
    rows = [r for r in rest if matrices and not any(r in ranks for ranks in matrices)]
    placed = {p.rank for e in _streamed_exprs(plan) for p in walk(e) if isinstance(p, Pos)}
    rows.sort(key=lambda rank: rank not in placed)
    grid = tuple(r for r in rest if r not in rows)
    return Roles(stream, grid, tuple(rows), tuple(lanes), tuple(r for r in lanes if r in walked))


def _streamed_exprs(plan: Plan) -> list[Expr]:
    return [*(s.expr for s in plan.stream), *(s.body for s in plan.states)]


def _streamed_inputs(plan: Plan) -> dict[str, tuple[str, ...]]:
    used = {read.tensor for expr in _streamed_exprs(plan) for read in reads(expr)}
    return {
        name: tensor.ranks
        for name, tensor in plan.inputs.items()
        if name in used and plan.rank in tensor.ranks
    }


def _before(plan: Plan, roles: Roles, ahead: list[Statement]) -> Plan:
    for item in plan.before:
        if item in plan.before and not _fits(item, roles):
            plan = _hoist(plan, item, ahead)
    return plan


def _fits(item: Statement, roles: Roles) -> bool:
    """Whether a tile can compute the statement: one lane at a time, and nothing across programs."""
    inside = ranks_of(item.expr) | set(item.ranks)
    if not roles.knows(inside) or inside & {roles.stream, *roles.walked}:
        return False
    if not item.over:
        return True
    lanes = [rank for rank in inside if rank in roles.lanes]
    return set(item.over) <= set(roles.lanes) and len(lanes) == 1


def _check(plan: Plan, roles: Roles, sizes: Mapping[str, int]) -> None:
    for step in (*plan.stream, *plan.steps):
        over = () if isinstance(step, Reference) else step.over
        alone = isinstance(step, Statement) and step.op == "sum" and len(over) == 1
        if set(roles.walked) & {*step.ranks, *(() if alone else over)}:
            raise UnsupportedError(
                f"{step.name} is no sum over one of {', '.join(roles.walked)} alone, which are walked"
            )
    for item in (*plan.before, *plan.stream, *plan.steps, *plan.finish):
        over = item.over if isinstance(item, (Statement, State)) else ()
        if not roles.knows([*item.ranks, *over]):
            raise UnsupportedError(f"{item.name} has ranks that no tile has: {item.ranks}")
        if len(roles.axes([*item.ranks, *over])) > 3:
            raise UnsupportedError(
                f"{item.name} needs a tile along {', '.join(roles.axes([*item.ranks, *over]))}: "
                "more than three axes"
            )
    for rank in roles.lanes:
        if rank not in sizes:
            raise UnsupportedError(f"the size of {rank} must be known: a tile has it whole")
        if sizes[rank] > LANES and rank not in roles.walked:
            raise UnsupportedError(f"{rank} has {sizes[rank]} lanes; a tile has {LANES} at most")
