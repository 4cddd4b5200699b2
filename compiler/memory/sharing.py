"""Which results are written where an argument lies that nothing reads afterwards, and why others are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ..ir.ops.record import operator_of
from ..ir.program import call_arguments
from .survey import Survey, number

#: Operators of torch that give their first argument with some of it replaced.
_OVER_FIRST = {torch.ops.aten.slice_scatter.default, torch.ops.aten.copy.default}


@dataclass
class Sharing:
    """What was decided for one order of the calls."""

    in_place: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict)
    refused: dict[tuple[fx.Node, int], list[str]] = field(default_factory=dict)
    """For results that are not, what is wrong with each argument that the operator might overwrite."""


def share(nodes: list[fx.Node], found: Survey) -> Sharing:
    """Decides for calls in this order; `found` is a survey of the program with nothing written in place.

    Torch says of an operator of its own that it is pointwise, an operator of einfold's says what it may
    overwrite (`Operator.overwrites`). Rows of a larger storage come first: that stays as long as any of its
    rows is read, so that they are there for nothing. What torch sums keeps its strides: a library's products
    may add in another order where rows lie further apart, and give other bits (6 rows of 48 in MKL for AVX2).
    """
    sharing = Sharing()
    moved: set[int] = set()  # storages whose values get other strides than they have in the survey
    place = {node: index for index, node in enumerate(nodes)}
    for node in nodes:
        taken: set[int] = set()
        for at, names in enumerate(candidates(node)):
            reasons = []
            for argument in sorted(names, key=lambda each: not _rows_of_more(found.values[each])):
                reason = (
                    why_not(node, at, argument, found)
                    or _still_read(node, argument, found, place, taken)
                    or _adds_otherwise(node, at, argument, found, moved)
                )
                if not reason:
                    sharing.in_place[node, at] = argument
                    taken.add(number(found.values[argument]))
                    if _moves(node, at, argument, found, moved):
                        moved.add(number(found.results(node)[at]))
                    break
                reasons.append(reason)
            if reasons and (node, at) not in sharing.in_place:
                sharing.refused[node, at] = reasons
    return sharing


def given_back(sharing: Sharing, nodes: list[fx.Node], found: Survey) -> Sharing:
    """The same without results over rows of a larger storage that nothing else reads as long, where at some
    step that holds more than they would by themselves: a column of a fused product would keep all of it.

    What is joined afterwards is not known here, so that the whole plan may hold more all the same.
    """
    place = {node: index for index, node in enumerate(nodes)}
    in_place, refused = dict(sharing.in_place), dict(sharing.refused)
    keys = {number(found.results(node)[at]): (node, at) for node, at in sharing.in_place}
    over = {new: number(found.values[sharing.in_place[key]]) for new, key in keys.items()}
    after = defaultdict[int, list[int]](list)  # what is written where a storage's values lie
    for new, old in over.items():
        after[old].append(new)

    def end(storage: int, alone: Collection[int]) -> int:
        """The step that lets a storage go, with all that is written there and not `alone`."""
        made = found.made[storage]
        read = [place.get(reader, len(place)) for reader in (made.node, *made.readers)]
        return max([1 + max(read), *(end(n, alone) for n in after[storage] if n not in alone)])

    def add(live: list[int], storage: int, alone: Collection[int], sign: int = 1) -> None:
        made = found.made[storage]
        for step in range(place[made.node], end(storage, alone)):
            live[step] += sign * made.size

    live = [0] * (len(place) + 1)
    roots = found.made.keys() - over.keys()
    for storage in roots:
        add(live, storage, ())
    rows = defaultdict[int, list[int]](list)  # by the storage that holds them in the end
    for new, old in over.items():
        if found.made[new].size < found.made[old].size:
            while old in over:
                old = over[old]
            rows[old].append(new)
    for storage, parts in rows.items():
        first, last = min(place[found.made[part].node] for part in parts), end(storage, ())
        add(live, storage, (), sign=-1)
        latest = sorted(parts, key=lambda part: -end(part, ()))
        choices = []
        for count in range(len(latest) + 1):
            alone, held = latest[:count], live.copy()
            for each in (storage, *alone):
                add(held, each, alone)
            choices.append((sorted(held[first:last], reverse=True), count, held))
        _, count, live = min(choices)
        for part in latest[:count]:
            del in_place[keys[part]]
            refused[keys[part]] = ["would keep more than its own"]
    return Sharing(in_place, refused)


def candidates(node: fx.Node) -> list[list[fx.Node]]:
    """For each result the arguments that it might be written over, by what the operator says of itself."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return []
    kind = operator_of(target)
    if kind is not None:
        given = call_arguments(node) if kind.overwrites else {}
        return [[given[name] for name in names] for names in kind.overwrites]
    if target in _OVER_FIRST:
        return [[each for each in node.args[:1] if isinstance(each, fx.Node)]]
    if torch.Tag.pointwise in target.tags:
        return [[each for each in node.args if isinstance(each, fx.Node)]]
    return []


def whole(node: fx.Node, found: Survey) -> list[list[int]]:
    """For each result the storages of its size that it can replace where nothing else reads them."""
    over = []
    for at, arguments in enumerate(candidates(node)):
        new = found.of(found.results(node)[at])
        fit = [
            each
            for each in arguments
            if new
            and not why_not(node, at, each, found)
            and not _adds_otherwise(node, at, each, found, set())
        ]
        olds = [number(found.values[each]) for each in fit]
        over.append([old for old in olds if new and found.made[old].size == new.size])
    return over


def why_not(node: fx.Node, at: int, argument: fx.Node, found: Survey) -> str:
    """Why a result can never be written where an argument lies; "" where it can once that is not read."""
    old = found.values[argument]
    if not isinstance(old, Tensor):
        return "is no tensor"
    new = found.results(node)[at]
    if found.of(old) is None:
        return "is an input or a weight"
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return "has another shape or type"
    if _repeats(old):
        return "has elements that lie over each other"
    for other in _read_of(node, old, found):
        if not _same(other, old) and not apart(other, old):
            return "lies across another argument"
    return ""


def _still_read(
    node: fx.Node,
    argument: fx.Node,
    found: Survey,
    place: Mapping[fx.Node, int],
    taken: set[int],
) -> str:
    old = found.values[argument]
    if number(old) in taken:
        return "is taken by another result"
    readers = found.made[number(old)].readers
    later = [each for each in readers if place.get(each, len(place)) > place[node]]
    for reader in later:
        read = [] if found.looks(reader) else _read_of(reader, old, found)
        if not all(apart(each, old) for each in read):
            return "is read later"
    return ""


def _moves(node: fx.Node, at: int, argument: fx.Node, found: Survey, moved: set[int]) -> bool:
    """Whether a result gets other strides where an argument lies; those of one element tell nothing."""
    old, new = found.values[argument], found.results(node)[at]
    lie = zip(new.shape, old.stride(), new.stride(), strict=True)
    return number(old) in moved or any(n > 1 and s != t for n, s, t in lie)


def _adds_otherwise(
    node: fx.Node, at: int, argument: fx.Node, found: Survey, moved: set[int]
) -> str:
    made = found.of(found.results(node)[at])
    if made is None or not _moves(node, at, argument, found, moved):
        return ""
    sums = (_adds(each) and not found.looks(each) for each in made.readers)
    return "has other strides, and is summed" if any(sums) else ""


def _adds(reader: fx.Node) -> bool:
    """Whether torch adds up what a call reads. Operators of einfold's are not asked: where torch runs them
    they were written down in its own (`expand`), and kernels add in one order at any strides."""
    mine = operator_of(reader.target) is not None
    return reader.op == "call_function" and not mine and not any(candidates(reader))


def _read_of(node: fx.Node, old: Tensor, found: Survey) -> Iterator[Tensor]:
    """What a node reads of the storage that holds a value."""
    for source in node.all_input_nodes:
        yield from (each for each in found.results(source) if number(each) == number(old))


def _rows_of_more(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_contiguous()
        and value.nbytes < value.untyped_storage().nbytes()
    )


def _repeats(tensor: Tensor) -> bool:
    return any(s == 0 and n > 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.storage_offset(), a.shape, a.stride()) == (b.storage_offset(), b.shape, b.stride())


def apart(a: Tensor, b: Tensor) -> bool:
    """Whether two views of a storage share no element: slices of the same rows, such as a gate and its up, or
    queries beside keys of fewer heads.

    Where it says so, it is so; of other forms it says nothing.
    """
    if a.dtype != b.dtype:
        return False
    strides = {s for x in (a, b) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1}
    rows = [*strides, a.untyped_storage().nbytes()]  # the last: one row that holds all
    for row in rows:
        mine, other = _within_rows(a, row), _within_rows(b, row)
        if mine and other and (mine[1] <= other[0] or other[1] <= mine[0]):
            return True
    return False


def _within_rows(tensor: Tensor, row: int) -> tuple[int, int] | None:
    """Where the elements of a view lie in rows of so many: from here up to there in each; None where that is
    not one interval of a row."""
    axes = [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    if row == 0 or any(s >= row and s % row for _, s in axes):
        return None
    start = int(tensor.storage_offset()) % row
    end = start + 1 + sum((n - 1) * s for n, s in axes if s < row)
    return (start, end) if end <= row else None
