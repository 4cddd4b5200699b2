"""Results that are put together afterwards: each is written where its part of the whole lies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from .survey import Joining, Survey, number

aten = torch.ops.aten


def join(nodes: Sequence[fx.Node], found: Survey) -> Joining:
    """Decides for calls in this order, by a survey of the program with results in place.

    Parts that lie behind each other in one storage are the whole already: what was written over the rows of
    another value. Parts that each have a storage to themselves get a place in the whole's. In both cases
    nothing may read these storages behind the `cat` by another name.
    """
    place = {node: index for index, node in enumerate(nodes)}
    parts: dict[tuple[fx.Node, int], tuple[fx.Node, int]] = {}
    whole: dict[fx.Node, Tensor] = {}
    for node in nodes:
        if node.target is aten.cat.default and _by_rows(node, found):
            values = [found.values[source] for source in node.all_input_nodes]
            owners = [found.of(value) for value in values]
            readers = {reader for owner in owners if owner for reader in owner.readers}
            last = max(place.get(reader, len(nodes)) for reader in (*readers, node))
            if None in owners or last > place[node]:
                continue
            if _behind_each_other(values):
                whole[node] = found.values[node]
            elif (own := _own(values, found)) is not None and not own & parts.keys():
                starts = _starts(values)
                parts |= {
                    found.made[number(value)].result: (node, start)
                    for value, start in zip(values, starts, strict=True)
                }
                whole[node] = found.values[node]
    return Joining(parts, whole)


def _by_rows(node: fx.Node, found: Survey) -> bool:
    """Whether parts of a `cat` are whole rows of it, one behind the other in memory."""
    out = found.values[node]
    axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    sources = list(node.args[0])  # type: ignore[arg-type]
    values = [found.values[source] for source in sources]
    return (
        math.prod(out.shape[: axis % out.ndim]) == 1
        and len(set(sources)) == len(sources)
        and all(each.is_contiguous() and each.dtype == out.dtype for each in values)
    )


def _starts(values: Sequence[Tensor]) -> list[int]:
    return [sum(each.numel() for each in values[:at]) for at in range(len(values))]


def _behind_each_other(values: Sequence[Tensor]) -> bool:
    first = values[0]
    return all(
        number(value) == number(first) and value.storage_offset() == first.storage_offset() + start
        for value, start in zip(values, _starts(values), strict=True)
    )


def _own(values: Sequence[Tensor], found: Survey) -> set[tuple[fx.Node, int]] | None:
    """The results that made the storages of values, where each value fills its own; None elsewhere."""
    storages = {number(value) for value in values}
    filled = all(value.nbytes == value.untyped_storage().nbytes() for value in values)
    if len(storages) < len(values) or not filled:
        return None
    return {found.made[each].result for each in storages}
