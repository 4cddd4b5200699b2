"""One spelling for equal cascades, so that every layer's attention is looked up under one key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .cascade import Cascade, Rank, Statement, Tensor
from .expr import Expr, rename_ranks, rename_tensors
from .plan import Plan, Reference, State, Step


@dataclass(frozen=True)
class Names:
    """New names by old ones. A plan's own names (`M.ref`) follow the tensor that they begin with."""

    ranks: Mapping[str, str]
    tensors: Mapping[str, str]

    def tensor(self, name: str) -> str:
        """The new name of a tensor or of what a plan made of it."""
        base, dot, rest = name.partition(".")
        return f"{self.tensors.get(base, base)}{dot}{rest}"

    def rank(self, name: str) -> str:
        """The new name of a rank."""
        return self.ranks.get(name, name)

    def backwards(self) -> Names:
        """From the new names to the old."""
        return Names(
            {new: name for name, new in self.ranks.items()},
            {new: name for name, new in self.tensors.items()},
        )


def canonical(cascade: Cascade) -> tuple[Cascade, Names]:
    """The cascade with names by order of appearance, and with extents that are names of their own."""
    ranks = {name: f"r{k}" for k, name in enumerate(cascade.ranks)}
    tensors = {name: f"a{k}" for k, name in enumerate(cascade.inputs)}
    for item in cascade.statements:
        tensors.setdefault(item.name, f"b{len(tensors)}")
    statements = tuple(item.renamed(ranks, tensors) for item in cascade.statements)
    return (
        Cascade(
            {
                ranks[n]: replace(r, name=ranks[n], extent=f"N{ranks[n]}")
                for n, r in cascade.ranks.items()
            },
            {
                tensors[n]: Tensor(tensors[n], tuple(ranks[r] for r in t.ranks), t.kind)
                for n, t in cascade.inputs.items()
            },
            statements,
            tuple(tensors[name] for name in cascade.outputs),
            cascade.dead,
        ),
        Names(ranks, tensors),
    )


def rename_plan(plan: Plan, names: Names, ranks: Mapping[str, Rank]) -> Plan:
    """The plan under other names; `ranks` are those of the cascade that has them."""
    every = {
        item.name: names.tensor(item.name)
        for item in (*plan.before, *plan.stream, *plan.steps, *plan.finish, *plan.emit)
    }
    every |= {name: names.tensor(name) for name in plan.inputs}
    every |= {f"{name}.old": f"{new}.old" for name, new in every.items()}

    def expr(value: Expr) -> Expr:
        return rename_tensors(rename_ranks(value, names.ranks), every)

    def over(values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names.rank(value) for value in values)

    def step(value: Step) -> Step:
        if isinstance(value, Statement):
            return value.renamed(names.ranks, every)
        if isinstance(value, Reference):
            return replace(
                value,
                name=every[value.name],
                ranks=over(value.ranks),
                source=every.get(value.source, ""),
            )
        assert isinstance(value, State)
        return replace(
            value,
            name=every[value.name],
            ranks=over(value.ranks),
            over=over(value.over),
            body=expr(value.body),
            correct=None if value.correct is None else expr(value.correct),
            references=tuple(every[name] for name in value.references),
        )

    def all_of(items: tuple[Statement, ...]) -> tuple[Statement, ...]:
        return tuple(item.renamed(names.ranks, every) for item in items)

    return replace(
        plan,
        rank=names.rank(plan.rank),
        ranks=dict(ranks),
        inputs={every[n]: Tensor(every[n], over(t.ranks), t.kind) for n, t in plan.inputs.items()},
        before=all_of(plan.before),
        stream=all_of(plan.stream),
        steps=tuple(step(value) for value in plan.steps),
        finish=all_of(plan.finish),
        emit=all_of(plan.emit),
        outputs=tuple(every.get(name, names.tensor(name)) for name in plan.outputs),
    )
