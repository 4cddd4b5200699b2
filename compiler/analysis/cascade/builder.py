"""What folding collects while it goes through a cascade: states, references, rows.

Equal states are kept once, equal references likewise: the denominators of a softmax and of its entropy
are one state.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...ir.cascade.cascade import Cascade, statement
from ...ir.cascade.expr import Expr, Ref, ranks_of, ref
from ...ir.cascade.plan import OLD, Reference, State, Step
from .normalise import Normaliser
from .scope import Kind, Scope


@dataclass
class Builder:
    """The parts of a plan so far, in the order in which they were made."""

    cascade: Cascade
    scope: Scope
    items: list[Step] = field(default_factory=list)
    _states: dict[tuple[object, ...], State] = field(default_factory=dict)
    _references: dict[tuple[str, Expr], Reference] = field(default_factory=dict)

    @property
    def rank(self) -> str:
        """The streamed rank."""
        return self.scope.rank

    @property
    def normaliser(self) -> Normaliser:
        """Takes expressions of the scope apart."""
        return Normaliser(self.scope)

    def order(
        self, ranks: frozenset[str] | set[str], first: tuple[str, ...] = ()
    ) -> tuple[str, ...]:
        """Ranks in a stable order: those of `first` as they stand there, then as declared."""
        return (
            *(r for r in first if r in ranks),
            *(r for r in self.cascade.ranks if r in ranks - set(first)),
        )

    def name(self, wanted: str) -> str:
        """`wanted`, with a number where it is taken."""
        taken = {item.name for item in self.items} | set(self.scope.statements)
        taken |= set(self.cascade.inputs)
        if wanted not in taken:
            return wanted
        return next(n for n in (f"{wanted}{k}" for k in range(1, 10_000)) if n not in taken)

    def row(self, wanted: str, expr: Expr, first: tuple[str, ...] = ()) -> Ref:
        """A row tensor that holds an expression; a plain read of one stays itself."""
        if isinstance(expr, Ref):
            return expr
        item = statement(self.name(wanted), self.order(ranks_of(expr), first), expr)
        self.items.append(item)
        self.scope.define(item)
        return item.ref

    def reference(self, kind: str, expr: Expr, first: tuple[str, ...]) -> Reference:
        """The reference that follows a row expression."""
        found = self._references.get((kind, expr))
        if found is None:
            source = self.row("plan.row", expr, first)
            found = Reference(
                self.name(f"{source.tensor}.{'ref' if kind == 'scale' else 'mid'}"),
                source.ranks,
                source.tensor,
                kind,
            )
            self.items.append(found)
            self.scope.depend(found.name, self.scope.needs_of(expr))
            self._references[kind, expr] = found
        return found

    def state(
        self,
        wanted: str,
        op: str,
        over: tuple[str, ...],
        body: Expr,
        ranks: tuple[str, ...],
        references: tuple[str, ...] = (),
    ) -> State:
        """The state that keeps this reduction; `correct` is set by whoever knows it."""
        key = (op, over, body)
        if key not in self._states:
            taken = any(item.name == wanted for item in self.items)
            made = State(
                self.name(wanted) if taken else wanted, ranks, op, over, body, None, references
            )
            self._states[key] = made
            self.items.append(made)
            self.scope.depend(made.name, self.scope.needs_of(body) | {made.name})
        return self._states[key]

    def correct(self, state: State, correction: Expr) -> None:
        """Gives a state its correction."""
        corrected = replace(state, correct=correction)
        self.items[self.items.index(state)] = corrected
        for key, value in self._states.items():
            if value is state:
                self._states[key] = corrected

    def is_extreme(self, name: str) -> bool:
        """Whether a completed reduction is a maximum or minimum."""
        item = self.scope.statements.get(name)
        return item is not None and item.op in ("max", "min")

    def is_row(self, expr: Expr) -> bool:
        """Whether the expression is known only when reductions are complete."""
        return self.scope.kind(expr) is Kind.ROW


def old(name: str, ranks: tuple[str, ...]) -> Ref:
    """The value of a part that is being corrected."""
    return ref(name + OLD, *ranks)
