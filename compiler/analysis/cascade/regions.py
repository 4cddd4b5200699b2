"""Cuts the cascade of a whole model into regions, each to be folded over one rank.

Around a rank R, completed reductions belong together when one feeds another along R: the maximum, the
denominator and the numerator of one attention. A reduction over another rank ends a region, so that the
projections of q, k and v are its inputs and the output projection reads what it gives. One exception: the
contraction that makes scores from queries and keys is computed again in every tile, since its result is
what must never be written out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ...ir.cascade.cascade import Cascade, Statement, Tensor
from ...ir.cascade.expr import Apply, Expr, reads
from ...ir.cascade.operators import OPERATORS
from .passes import count_passes


@dataclass(frozen=True)
class Region:
    """A part of a cascade that is folded over `rank`."""

    rank: str
    cascade: Cascade

    @property
    def reductions(self) -> frozenset[str]:
        """The names of its reductions, over whichever rank."""
        return frozenset(item.name for item in self.cascade.statements if item.op)


def regions(cascade: Cascade, weights: Iterable[str] = ()) -> list[Region]:
    """The regions in which reductions over one rank feed each other, in order of their first statement.

    No reduction is in two regions. Scores of normalised queries could belong to the norm and to the
    softmax: the region with most passes over its rank has the first choice, and the others are cut from
    what it leaves. Maps may be in several, each region computing them for itself.
    `weights` names inputs that are parameters: a product with one is never computed tile by tile.
    """
    known = frozenset(weights)
    reduced = dict.fromkeys(rank for item in cascade.statements for rank in item.over)
    parts = [part for rank in reduced for part in _Cutter(cascade, rank, known).run()]
    found: list[Region] = []
    taken: frozenset[str] = frozenset()
    for part in sorted(parts, key=lambda part: -count_passes(part.cascade, part.rank)):
        left = [part]
        if part.reductions & taken:
            again = _Cutter(cascade, part.rank, known, taken).run()
            left = [smaller for smaller in again if smaller.reductions <= part.reductions]
        found += left
        taken = taken.union(*(region.reductions for region in left))
    place = {item.name: at for at, item in enumerate(cascade.statements)}
    return sorted(found, key=lambda region: place[region.cascade.statements[0].name])


@dataclass
class _Cutter:
    cascade: Cascade
    rank: str
    weights: frozenset[str]
    #: Statements that belong to another region; here they are inputs.
    outside: frozenset[str] = frozenset()
    _items: dict[str, Statement] = field(default_factory=dict)
    #: Of each statement, the reductions over the rank that it follows from through maps alone.
    _local: dict[str, frozenset[str]] = field(default_factory=dict)

    def run(self) -> list[Region]:
        groups: list[set[str]] = []
        for item in self.cascade.statements:
            self._items[item.name] = item
            behind = self._behind(item.expr)
            if item.name in self.outside:
                self._local[item.name] = frozenset()
            elif self.rank in item.over:
                self._local[item.name] = frozenset({item.name})
                if behind:
                    groups = _joined(groups, {item.name, *behind})
            else:
                self._local[item.name] = frozenset() if item.op else behind
        return [self._region(group) for group in groups]

    def _behind(self, expr: Expr) -> frozenset[str]:
        none: frozenset[str] = frozenset()
        return none.union(*(self._local.get(read.tensor, none) for read in reads(expr)))

    def _region(self, group: set[str]) -> Region:
        inside = set(group)
        rows = set().union(
            *(self._items[name].ranks for name in group if self._items[name].op != "sum")
        )
        queue = [self._items[name] for name in group]
        for item in self.cascade.statements:
            follows = self._local[item.name]
            if not item.op and follows and follows <= group:
                inside.add(item.name)
                queue.append(item)
        while queue:
            for read in reads(queue.pop().expr):
                source = self._items.get(read.tensor)
                if source is None or source.name in inside | self.outside:
                    continue
                if source.op is None or self._is_scores(source, rows):
                    inside.add(source.name)
                    queue.append(source)
        return Region(self.rank, self._cut(inside))

    def _is_scores(self, item: Statement, rows: set[str]) -> bool:
        """A contraction over another rank that spreads rows over R, of tensors that are no weights."""
        if self.rank in item.over or self.rank not in item.ranks or not rows <= set(item.ranks):
            return False
        spread = set(item.ranks) - {self.rank}
        for read in reads(item.expr):
            if self._is_weight(read.tensor):
                return False
            if self.rank in read.ranks and spread <= set(read.ranks):
                return False  # it is as large as its operand: a norm or a sum, not a product
        return True

    def _is_weight(self, name: str) -> bool:
        if name in self.weights:
            return True
        item = self._items.get(name)
        return item is not None and all(self._is_weight(read.tensor) for read in reads(item.expr))

    def _cut(self, inside: set[str]) -> Cascade:
        """The statements `inside` as a cascade; what they read is an input, what others read an output."""
        kept = tuple(item for item in self.cascade.statements if item.name in inside)
        inputs = dict(self.cascade.inputs)
        for item in self.cascade.statements:
            if item.name not in inside:
                inputs[item.name] = Tensor(item.name, item.ranks, _kind(item))
        wanted = set(self.cascade.outputs)
        for item in self.cascade.statements:
            if item.name not in inside:
                wanted |= {read.tensor for read in reads(item.expr)}
        # A map that was taken along and is read elsewhere too stays there as well.
        own = {name for name in inside if self._local[name]}
        outputs = tuple(item.name for item in kept if item.name in wanted & own)
        return Cascade(self.cascade.ranks, inputs, kept, outputs, self.cascade.dead).pruned()


def _joined(groups: list[set[str]], more: set[str]) -> list[set[str]]:
    apart = [group for group in groups if not group & more]
    return [*apart, more.union(*(group for group in groups if group & more))]


def _kind(item: Statement) -> str:
    truth = isinstance(item.expr, Apply) and OPERATORS[item.expr.op].truth
    return "bool" if truth else "real"
