"""Cascades: ranks, inputs, statements, outputs.

    rank t : T virtual 1
    input K[b, t, d]
    M[b, s] = S[b, s, t] :: max(t)

A statement is the paper's `M_{b,s} = S_{b,s,t} :: V_t max`: a map at every point of the ranks on both
sides, reduced over those that stand after `::`. Source: FuseMax, section 2 (extended einsums).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from .expr import (
    Expr,
    Index,
    Ref,
    Size,
    ranks_of,
    reads,
    rename_index,
    rename_ranks,
    rename_tensors,
    walk,
)


@dataclass(frozen=True)
class Rank:
    """An iteration space.

    `extent` names or gives its size. `virtual` coordinates follow the real ones: there every input
    reads 0, so that only what a statement says with `virtual(t)` happens. An `iterative` rank is walked
    in order, and a statement may write its next coordinate (`M[i+1, s] = max(M[i, s], ...)`).
    """

    name: str
    extent: str
    virtual: int = 0
    iterative: bool = False


@dataclass(frozen=True)
class Tensor:
    """An input, read at plain coordinates of these ranks. `kind` is real, integer or bool."""

    name: str
    ranks: tuple[str, ...]
    kind: str = "real"


@dataclass(frozen=True)
class Statement:
    """`name[indices] = expr :: op(over)`; without `op` a plain map."""

    name: str
    indices: tuple[Index, ...]
    expr: Expr
    op: str | None = None
    over: tuple[str, ...] = ()

    @property
    def ranks(self) -> tuple[str, ...]:
        """The ranks of the result."""
        return tuple(index.rank for index in self.indices if index.rank and not index.end)

    @property
    def ref(self) -> Ref:
        """A read of the result at the coordinates at which it is written."""
        return Ref(self.name, self.indices)

    def renamed(
        self, ranks: Mapping[str, str], tensors: Mapping[str, str] | None = None
    ) -> Statement:
        """The same statement over other ranks, reading and writing other tensors."""
        tensors = tensors or {}
        return Statement(
            tensors.get(self.name, self.name),
            tuple(rename_index(index, ranks) for index in self.indices),
            rename_tensors(rename_ranks(self.expr, ranks), tensors),
            self.op,
            tuple(ranks.get(rank, rank) for rank in self.over),
        )


def statement(
    name: str, ranks: Iterable[str], expr: Expr, op: str | None = None, over: Iterable[str] = ()
) -> Statement:
    """A statement whose result is written at plain coordinates."""
    return Statement(name, tuple(Index(rank) for rank in ranks), expr, op, tuple(over))


@dataclass(frozen=True)
class Cascade:
    """Statements in order, each reading inputs and earlier results.

    `dead` is the policy for rows with no live key: "as written" gives what the statements give, NaN
    for a softmax; "zero" writes 0 where a result is NaN.
    """

    ranks: Mapping[str, Rank]
    inputs: Mapping[str, Tensor]
    statements: tuple[Statement, ...]
    outputs: tuple[str, ...]
    dead: str = field(default="as written")

    def of(self, name: str) -> Statement | None:
        """The statement that computes a tensor, or None for an input."""
        return next((s for s in self.statements if s.name == name), None)

    def ranks_of(self, name: str) -> tuple[str, ...]:
        """The ranks of an input or a result."""
        if name in self.inputs:
            return self.inputs[name].ranks
        found = self.of(name)
        if found is None:
            raise KeyError(name)
        return found.ranks

    def pruned(self) -> Cascade:
        """Without statements, inputs and ranks that no output needs."""
        needed, kept = set(self.outputs), []
        for item in reversed(self.statements):
            if item.name in needed:
                kept.append(item)
                needed |= {read.tensor for read in reads(item.expr)}
        kept.reverse()
        inputs = {name: tensor for name, tensor in self.inputs.items() if name in needed}
        used = {rank for tensor in inputs.values() for rank in tensor.ranks}
        for item in kept:
            used |= {index.rank for index in item.indices} | ranks_of(item.expr) | set(item.over)
            used |= {index.rank for read in reads(item.expr) for index in read.indices}
        used |= _sizes(kept)
        ranks = {name: rank for name, rank in self.ranks.items() if name in used}
        return replace(self, ranks=ranks, inputs=inputs, statements=tuple(kept))


def _sizes(statements: Iterable[Statement]) -> set[str]:
    return {p.rank for s in statements for p in walk(s.expr) if isinstance(p, Size)}
