"""What an import has built so far, and the few moves that all operators are made of.

align     several values over the same dimensions, as broadcasting does
state     a statement for an expression, read by name afterwards
reduce    a reduction over dimensions
instance  the same value walked along another rank, with all that it is computed from
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...ir.cascade.cascade import Statement, statement
from ...ir.cascade.expr import (
    Apply,
    Const,
    Expr,
    Ref,
    Virtual,
    apply,
    ranks_of,
    reads,
    ref,
    rename_ranks,
    rewrite,
)
from ...ir.cascade.operators import REDUCTIONS
from .ranks import NotExpressedError, RankTable

Dim = tuple[str, ...]


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: a product of ranks a dimension, and what it is at one point.

    A dimension of size one is (). `real` has the ranks whose virtual coordinates a slice cut off.
    """

    dims: tuple[Dim, ...]
    expr: Expr
    kind: str = "real"
    real: frozenset[str] = frozenset()

    @property
    def ranks(self) -> Dim:
        """All ranks, outermost first."""
        return tuple(rank for dim in self.dims for rank in dim)


@dataclass(frozen=True)
class Source:
    """An input of the cascade: a value from outside, and the ranks of each of its dimensions."""

    name: str
    key: object
    dims: tuple[Dim, ...]
    kind: str


@dataclass
class Context:
    """Ranks, inputs and statements of an import."""

    ranks: RankTable = field(default_factory=RankTable)
    sources: dict[str, Source] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    #: How many virtual coordinates stand ahead of the real ones in the graph's tensor.
    fronts: dict[str, int] = field(default_factory=dict)
    #: Which operator of the graph made a rank with virtual coordinates.
    joins: dict[str, str] = field(default_factory=dict)
    #: Of statements that hold a tensor of the graph: its name there, and the ranks of each dimension.
    origins: dict[str, tuple[str, tuple[Dim, ...]]] = field(default_factory=dict)
    _instances: dict[tuple[str, tuple[tuple[str, str], ...]], str] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def name(self, wanted: str) -> str:
        """`wanted` as a name of its own, without dots."""
        wanted = wanted.replace(".", "_")
        number = 1
        found = wanted
        while found in self._taken:
            found, number = f"{wanted}_{number}", number + 1
        self._taken.add(found)
        return found

    def source(
        self, wanted: str, key: object, sizes: Sequence[int], kind: str, extents: Sequence[str]
    ) -> Value:
        """A new input with ranks of its own."""
        dims = tuple(
            (self.ranks.fresh(size, extent),) if size != 1 else ()
            for size, extent in zip(sizes, extents, strict=True)
        )
        name = self.name(wanted)
        self.sources[name] = Source(name, key, dims, kind)
        value = Value(dims, ref(name, *(rank for dim in dims for rank in dim)), kind)
        self.ranks.keep_apart(value.ranks)
        return value

    def is_computed(self, value: Value) -> bool:
        """Whether the value follows from a reduction, so that it is not an input read in another way."""
        return bool(self._reduced(value))

    def is_normalised(self, value: Value) -> bool:
        """Whether the value runs along a rank that it, as weights do, follows from a reduction over."""
        return bool(self._reduced(value) & set(self.now(value).ranks))

    def _reduced(self, value: Value) -> set[str]:
        """The ranks that what the value follows from is reduced over."""
        statements = {item.name: item for item in self.statements}
        work, seen = [read.tensor for read in reads(value.expr)], set()
        found: set[str] = set()
        while work:
            item = statements.get(work.pop())
            if item is not None and item.name not in seen:
                seen.add(item.name)
                found.update(self.ranks.resolve(item.over))
                work += [read.tensor for read in reads(item.expr)]
        return found

    def now(self, value: Value) -> Value:
        """The value over the ranks as they stand now."""
        dims = tuple(self.ranks.resolve(dim) for dim in value.dims)
        real = frozenset(self.ranks.resolve(value.real))
        return Value(dims, self.ranks.resolve_expr(value.expr), value.kind, real)

    def state(self, wanted: str, value: Value) -> Value:
        """The value as a statement of its own, unless it is a name or a number already."""
        value = self.now(value)
        if isinstance(value.expr, (Ref, Const)):
            return value
        name = self.name(wanted)
        inside = ranks_of(value.expr)
        ranks = [rank for rank in value.ranks if rank in inside]
        self.statements.append(statement(name, ranks, value.expr))
        return replace(value, expr=ref(name, *ranks))

    def reduce(
        self, wanted: str, op: str, value: Value, dims: Sequence[int], keep: bool = False
    ) -> Value:
        """A reduction over dimensions; virtual coordinates that were cut off do not count."""
        value = self.now(value)
        dims = [dim % max(len(value.dims), 1) for dim in dims]
        over = [rank for dim in dims for rank in value.dims[dim]]
        expr = value.expr
        for rank in over:
            if rank in value.real:
                for number in range(self.ranks.virtual.get(rank, 0)):
                    expr = apply("where", Virtual(rank, number), REDUCTIONS[op][0], expr)
        name = self.name(wanted)
        self.ranks.keep_apart(value.ranks)
        left = tuple(
            () if at in dims else dim for at, dim in enumerate(value.dims) if keep or at not in dims
        )
        if op == "sum" and value.kind == "bool":
            expr = apply("where", expr, 1.0, 0.0)
        inside = ranks_of(expr) | set(over)
        ranks = [rank for dim in left for rank in dim if rank in inside]
        if over:
            self.statements.append(statement(name, ranks, expr, op, over))
            expr = ref(name, *ranks)
        kind = "real" if value.kind == "bool" and op == "sum" else value.kind
        return Value(left, expr, kind, value.real - set(over))

    def instance(self, value: Value, names: Mapping[str, str]) -> Value:
        """The value walked along other ranks."""
        value = self.now(value)
        dims = tuple(tuple(names.get(rank, rank) for rank in dim) for dim in value.dims)
        # An instance along a rank with virtual coordinates knows the real ones only.
        real = frozenset(names.get(r, r) for r in value.real)
        real |= {
            new for old, new in names.items() if self._more_virtual(new, old) and old in value.ranks
        }
        return Value(dims, self._instance_expr(value.expr, names), value.kind, real)

    def _more_virtual(self, new: str, old: str) -> bool:
        return self.ranks.virtual.get(new, 0) > self.ranks.virtual.get(old, 0)

    def _instance_expr(self, expr: Expr, names: Mapping[str, str]) -> Expr:
        def change(part: Expr) -> Expr | None:
            if isinstance(part, Ref):
                used = {rank: names[rank] for rank in part.ranks if rank in names}
                indices = rename_ranks(part, names)
                assert isinstance(indices, Ref)
                return Ref(self._instance_of(part.tensor, used), indices.indices) if used else part
            return None if isinstance(part, (Apply, Const)) else rename_ranks(part, names)

        return rewrite(expr, change)

    def _instance_of(self, name: str, names: Mapping[str, str]) -> str:
        """The input or statement `name` made along other ranks."""
        key = (name, tuple(sorted(names.items())))
        if key in self._instances:
            return self._instances[key]
        made = self._instances[key] = self.name(name)
        if name in self.sources:
            source = self.sources[name]
            dims = self._renamed(source.dims, names)
            self.sources[made] = Source(made, source.key, dims, source.kind)
            return made
        if name in self.origins:
            node, dims = self.origins[name]
            self.origins[made] = node, self._renamed(dims, names)
        item = next(s for s in self.statements if s.name == name)
        ranks = [names.get(rank, rank) for rank in self.ranks.resolve(item.ranks)]
        over = self.ranks.resolve(item.over)
        clashes = {rank: self.ranks.like(rank) for rank in over if rank in names.values()}
        expr = self._instance_expr(self.ranks.resolve_expr(item.expr), {**names, **clashes})
        bound = [clashes.get(rank, rank) for rank in over]
        self.ranks.keep_apart([*ranks, *bound])
        self.statements.append(statement(made, ranks, expr, item.op, bound))
        return made

    def _renamed(self, dims: tuple[Dim, ...], names: Mapping[str, str]) -> tuple[Dim, ...]:
        resolved = (self.ranks.resolve(dim) for dim in dims)
        return tuple(tuple(names.get(rank, rank) for rank in dim) for dim in resolved)

    def distinct(self, value: Value, ranks: Sequence[str]) -> Value:
        """The value along fresh ranks where it has one of `ranks`."""
        value = self.now(value)
        taken = set(self.ranks.resolve(ranks))
        names = {rank: self.ranks.like(rank) for rank in value.ranks if rank in taken}
        return self.instance(value, names) if names else value

    def meet(self, a: Value, at_a: int, b: Value, at_b: int) -> tuple[Value, Value]:
        """Makes dimension `at_a` of one value and `at_b` of another the same ranks."""
        a, b = self.now(a), self.now(b)
        if not a.dims[at_a] or not b.dims[at_b]:
            return a, b
        common = self.ranks.common(a.dims[at_a], b.dims[at_b], a.real, b.real)
        for left, right in zip(*common, strict=True):
            (left,), (right,) = self.ranks.resolve([left]), self.ranks.resolve([right])
            a, b = self.now(a), self.now(b)
            if left != right:
                a, b = self._join(a, left, b, right)
        return self.now(a), self.now(b)

    def _join(self, a: Value, left: str, b: Value, right: str) -> tuple[Value, Value]:
        """Makes two ranks one, everywhere or, where they must stay apart, in one of the values."""
        if self.ranks.can_unify(left, right):
            self.ranks.unify(left, right)
            return a, b
        if self._more_virtual(left, right) and left not in a.real:
            raise NotExpressedError("a tensor has one coordinate more than the keys it meets")
        if self._more_virtual(right, left) and right not in b.real:
            raise NotExpressedError("a tensor has one coordinate more than the keys it meets")
        if left not in b.ranks and not self._more_virtual(right, left):
            return a, self.instance(b, {right: left})
        if right not in a.ranks and not self._more_virtual(left, right):
            return self.instance(a, {left: right}), b
        raise NotExpressedError("a tensor is walked along two of its own dimensions at once")

    def align(self, values: Sequence[Value]) -> tuple[list[Value], tuple[Dim, ...]]:
        """Values over common dimensions by the rules of broadcasting, and those dimensions."""
        values = list(values)
        width = max((len(value.dims) for value in values), default=0)
        values = [replace(v, dims=((),) * (width - len(v.dims)) + v.dims) for v in values]
        for at in range(width):
            for one in range(len(values)):
                for other in range(one + 1, len(values)):
                    values[one], values[other] = self.meet(values[one], at, values[other], at)
        values = [self.now(value) for value in values]
        for at in range(1, len(values)):
            values[at] = self._apart_from(values[:at], values[at])
        dims = tuple(next((v.dims[at] for v in values if v.dims[at]), ()) for at in range(width))
        self.ranks.keep_apart([rank for dim in dims for rank in dim])
        return values, dims

    def _apart_from(self, before: Sequence[Value], value: Value) -> Value:
        """The value with fresh ranks where an earlier one has them along another dimension."""
        clash = {
            rank
            for earlier in before
            for at, dim in enumerate(earlier.dims)
            for rank in dim
            if rank not in value.dims[at] and rank in value.ranks
        }
        return self.distinct(value, sorted(clash)) if clash else value
