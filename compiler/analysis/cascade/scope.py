"""What each part of a cascade depends on, seen from one streamed rank R.

free    does not depend on a completed reduction over R: known tile by tile
row     depends on one, and does not carry R: known at the end, or as a running value
mixed   depends on one and carries R: what folding has to take apart
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ...ir.cascade.cascade import Cascade, Statement
from ...ir.cascade.expr import Expr, Ref, ranks_of, reads, rewrite


class Kind(Enum):
    """The three kinds of the module's docstring."""

    FREE = "free"
    ROW = "row"
    MIXED = "mixed"


class RefusedError(Exception):
    """A reduction cannot be folded; the message is a sentence that names `factor`."""

    def __init__(self, reason: str, factor: Expr) -> None:
        super().__init__(reason)
        self.reason, self.factor = reason, factor


@dataclass
class Scope:
    """A cascade, the streamed rank, and the statements that folding adds on the way."""

    cascade: Cascade
    rank: str
    statements: dict[str, Statement] = field(default_factory=dict)
    #: Maxima by the map of other maxima that they were found to be.
    hoisted: dict[str, Expr] = field(default_factory=dict)
    _needs: dict[str, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in self.cascade.statements:
            self.statements[item.name] = item

    def define(self, item: Statement) -> None:
        """Makes a statement that folding adds known."""
        self.statements[item.name] = item

    def depend(self, name: str, on: frozenset[str]) -> None:
        """Says what a name that no statement computes (a state) depends on."""
        self._needs[name] = on

    def needs(self, name: str) -> frozenset[str]:
        """The completed reductions over R that a tensor depends on, itself among them."""
        if name not in self._needs:
            item = self.statements.get(name)
            found: frozenset[str] = frozenset()
            if item is not None:
                found = self.needs_of(item.expr)
                if self.rank in item.over:
                    found |= {name}
            self._needs[name] = found
        return self._needs[name]

    def needs_of(self, expr: Expr) -> frozenset[str]:
        """The completed reductions over R that an expression depends on."""
        return frozenset().union(*(self.needs(read.tensor) for read in reads(expr)))

    def carries(self, expr: Expr) -> bool:
        """Whether the expression varies along R."""
        return self.rank in ranks_of(expr)

    def kind(self, expr: Expr) -> Kind:
        """Free, row or mixed."""
        if not self.needs_of(expr):
            return Kind.FREE
        return Kind.MIXED if self.carries(expr) else Kind.ROW

    def inline(self, expr: Expr) -> Expr:
        """The expression with every mixed map written out; reductions and what is free stay names."""

        def change(part: Expr) -> Expr | None:
            if not isinstance(part, Ref) or self.kind(part) is not Kind.MIXED:
                return None
            item = self.statements[part.tensor]
            return None if item.op else self.inline(item.expr)

        return rewrite(expr, change)

    def definition(self, expr: Expr, kind: Kind) -> Expr | None:
        """What a name stands for, where it is a map of this kind."""
        if not isinstance(expr, Ref) or self.kind(expr) is not kind:
            return None
        item = self.statements.get(expr.tensor)
        if item is None or item.op:
            return self.hoisted.get(expr.tensor)
        return item.expr
