"""The ranks of an import: which are the same, which are products of others, which must stay apart."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

from ...ir.cascade.expr import Expr, Index, Pos, Ref, Size, Virtual, apply, rewrite


class NotExpressedError(Exception):
    """An operator, or this use of it, has no form as a cascade; its result is then an input."""


@dataclass
class RankTable:
    """Ranks by number-free names (`r0`), with what is known about each.

    `apart` has groups of ranks that some tensor or statement walks at the same time, so that no two of
    them may become one.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    extents: dict[str, str] = field(default_factory=dict)
    virtual: dict[str, int] = field(default_factory=dict)
    _into: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _apart: list[tuple[str, ...]] = field(default_factory=list)

    def fresh(self, size: int, extent: str | None = None, virtual: int = 0) -> str:
        """A new rank. Sizes of one have no rank."""
        name = f"r{len(self.sizes)}"
        self.sizes[name] = size
        self.extents[name] = extent or str(size)
        if virtual:
            self.virtual[name] = virtual
        return name

    def like(self, rank: str) -> str:
        """A new rank of the same size."""
        return self.fresh(self.sizes[rank], self.extents[rank], self.virtual.get(rank, 0))

    def resolve(self, ranks: Iterable[str]) -> tuple[str, ...]:
        """The ranks as they stand now, outermost first."""
        found: list[str] = []
        for rank in ranks:
            into = self._into.get(rank)
            found += [rank] if into is None else self.resolve(into)
        return tuple(found)

    def keep_apart(self, ranks: Iterable[str]) -> None:
        """These are walked together."""
        group = tuple(ranks)
        if len(group) > 1:
            self._apart.append(group)

    def are_apart(self, a: str, b: str) -> bool:
        """Whether two ranks are walked together somewhere."""
        for group in self._apart:
            resolved = self.resolve(group)
            if a in resolved and b in resolved:
                return True
        return False

    def can_unify(self, a: str, b: str) -> bool:
        """Whether two ranks of one size may become one."""
        same = self.virtual.get(a, 0) == self.virtual.get(b, 0)
        return same and not self.are_apart(a, b)

    def unify(self, a: str, b: str) -> None:
        """Makes b another name of a."""
        if a != b:
            self._into[b] = (a,)
            if self.extents[a].isdigit() and not self.extents[b].isdigit():
                self.extents[a] = self.extents[b]

    def split(self, rank: str, outer: int) -> tuple[str, str]:
        """Cuts a rank into an outer one of this size and an inner one."""
        if self.sizes[rank] % outer or self.virtual.get(rank):
            raise NotExpressedError(
                f"a dimension of {self.sizes[rank]} cannot be cut into {outer} parts"
            )
        pair = (self.fresh(outer), self.fresh(self.sizes[rank] // outer))
        self._into[rank] = pair
        self.keep_apart(pair)
        return pair

    def size(self, rank: str, real: Container[str] = ()) -> int:
        """How long a dimension of this rank is; virtual coordinates count where no slice cut them off."""
        return self.sizes[rank] + (0 if rank in real else self.virtual.get(rank, 0))

    def regroup(
        self, ranks: Sequence[str], sizes: Sequence[int], real: Container[str] = ()
    ) -> list[tuple[str, ...]]:
        """The ranks of a flattened tensor, cut and grouped to dimensions of these sizes."""
        left = list(self.resolve(ranks))
        groups: list[tuple[str, ...]] = []
        for size in sizes:
            group: list[str] = []
            need = size
            while need > 1:
                if not left:
                    raise NotExpressedError("a reshape needs more elements than there are")
                rank = left.pop(0)
                if self.size(rank, real) > need:
                    outer, inner = self.split(rank, need)
                    rank = outer
                    left.insert(0, inner)
                if need % self.size(rank, real):
                    raise NotExpressedError("a reshape cuts across dimensions")
                need //= self.size(rank, real)
                group.append(rank)
            groups.append(tuple(group))
        return groups

    def common(
        self,
        a: Sequence[str],
        b: Sequence[str],
        real_a: Container[str] = (),
        real_b: Container[str] = (),
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Two dimensions of one size, cut until their ranks have the same sizes."""
        left, right = list(self.resolve(a)), list(self.resolve(b))
        done_a: list[str] = []
        done_b: list[str] = []
        while left and right:
            size_a, size_b = self.size(left[0], real_a), self.size(right[0], real_b)
            if size_a == size_b:
                done_a.append(left.pop(0))
                done_b.append(right.pop(0))
            elif size_a > size_b:
                left[:1] = self.split(left[0], size_b)
            else:
                right[:1] = self.split(right[0], size_a)
        if left or right:
            raise NotExpressedError("dimensions of different sizes meet")
        return tuple(done_a), tuple(done_b)

    def resolve_expr(self, expr: Expr) -> Expr:
        """The expression over the ranks as they stand now."""

        def change(part: Expr) -> Expr | None:
            if isinstance(part, Ref):
                ranks = self.resolve(index.rank for index in part.indices)
                return Ref(part.tensor, tuple(Index(rank) for rank in ranks))
            if isinstance(part, Pos):
                return self._position(self.resolve([part.rank]))
            if isinstance(part, Size):
                sizes: Expr | None = None
                for rank in self.resolve([part.rank]):
                    sizes = Size(rank) if sizes is None else apply("mul", sizes, Size(rank))
                return sizes
            if isinstance(part, Virtual):
                (rank,) = self.resolve([part.rank])
                return Virtual(rank, part.number)
            return None

        return rewrite(expr, change)

    def _position(self, ranks: tuple[str, ...]) -> Expr:
        total: Expr = Pos(ranks[0])
        for rank in ranks[1:]:
            total = apply("add", apply("mul", total, Size(rank)), Pos(rank))
        return total
