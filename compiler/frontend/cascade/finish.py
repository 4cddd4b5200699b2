"""The end of an import: ranks as they stand at last, under short names, and nothing that is unused."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.cascade.cascade import Cascade, Rank, Statement, Tensor, statement
from ...ir.cascade.expr import Ref
from .context import Context, Dim, Value

#: In the order in which ranks of [batch, head, query, head size] x [.., key, ..] x value are met.
_LETTERS = "bhsdtfgkmnpqruvwxyzaceijlo"

Bound = tuple[object, str, tuple[Dim, ...]]


def finish_cascade(
    context: Context, outputs: Sequence[tuple[str, Value]]
) -> tuple[Cascade, list[Bound], list[Bound], list[Bound], dict[str, int]]:
    """The cascade; its inputs, outputs and other tensors of the graph, each as (node, name, ranks a
    dimension); and the sizes of ranks."""
    table = context.ranks
    items = [_resolved(context, item) for item in context.statements]
    dims = {name: tuple(table.resolve(d) for d in s.dims) for name, s in context.sources.items()}
    written = [(node, context.now(value)) for node, value in outputs]
    names: list[str] = []
    for _, value in written:
        assert isinstance(value.expr, Ref)
        names.append(value.expr.tensor)
    order: list[str] = []
    for source in context.sources:
        order += [rank for dim in dims[source] for rank in dim]
    for item in items:
        order += [*item.ranks, *item.over]
    for _, value in written:
        order += value.ranks
    letters = {rank: _letter(at) for at, rank in enumerate(dict.fromkeys(order))}
    cascade = Cascade(
        {
            letters[r]: Rank(letters[r], _extent(table.extents[r]), table.virtual.get(r, 0))
            for r in dict.fromkeys(order)
        },
        {
            name: Tensor(name, tuple(letters[r] for d in dims[name] for r in d), source.kind)
            for name, source in context.sources.items()
        },
        tuple(item.renamed(letters) for item in items),
        tuple(dict.fromkeys(names)),
    ).pruned()
    sizes = {letters[r]: table.sizes[r] for r in dict.fromkeys(order)}
    bound: list[Bound] = [
        (context.sources[name].key, name, _renamed(dims[name], letters)) for name in cascade.inputs
    ]
    done: list[Bound] = [
        (node, name, _renamed(value.dims, letters))
        for (node, value), name in zip(written, names, strict=True)
    ]
    nodes: list[Bound] = []
    for item in cascade.statements:
        if item.name in context.origins:
            node, at = context.origins[item.name]
            at = tuple(table.resolve(dim) for dim in at)
            if all(rank in letters for dim in at for rank in dim):
                nodes.append((node, item.name, _renamed(at, letters)))
    return cascade, bound, done, nodes, sizes


def _resolved(context: Context, item: Statement) -> Statement:
    ranks = context.ranks.resolve(item.ranks)
    over = context.ranks.resolve(item.over)
    return statement(item.name, ranks, context.ranks.resolve_expr(item.expr), item.op, over)


def _renamed(dims: tuple[Dim, ...], letters: dict[str, str]) -> tuple[Dim, ...]:
    return tuple(tuple(letters[rank] for rank in dim) for dim in dims)


def _letter(at: int) -> str:
    turn, place = divmod(at, len(_LETTERS))
    return _LETTERS[place] + (str(turn) if turn else "")


def _extent(text: str) -> str:
    """An extent as one word: a computed size such as `2*s0` has no name of its own."""
    return text if text.isalnum() else "N" + "".join(c if c.isalnum() else "_" for c in text)
