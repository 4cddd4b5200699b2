"""Finds attention in an ATen graph by dataflow: reductions that feed contractions.

    scores = q @ k            contraction
    p = softmax(f(scores))    reductions and point-by-point work        one region
    out = p @ v               contraction of what was reduced

A region is grown backwards from the last contraction to the contractions that it comes from, with the
masks and biases that only it uses, and forwards over what follows point by point. Operators are told
apart by what they do to dimensions; no sequence of them is looked for.

Where it is asked for, scores that nothing reduces make a region too: sigmoid(q @ k) @ v. That is one pass
as it is written, and gains where the scores are never in memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from ..frontend.aten_kinds import (
    CONTRACTIONS,
    CREATION,
    MADE,
    NORMS,
    POINTWISE,
    REDUCTIONS,
    SPLITS,
    VIEWS,
    WHOLE,
    name_of,
)


@dataclass(frozen=True)
class Region:
    """A part of a graph: its nodes in order, what it reads from outside, what outside reads of it.

    `unreduced` is what it was looked for with.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    anchor: fx.Node
    unreduced: bool = False

    def again(self) -> Region:
        """The region as the graph stands now: what it reads and what is read of it may have been replaced."""
        return region_of(self.nodes, self.anchor, self.unreduced)


def region_of(nodes: tuple[fx.Node, ...], anchor: fx.Node, unreduced: bool = False) -> Region:
    """The region of these nodes, with what they read and what is read of them as the graph stands now."""
    return Region(nodes, _inputs(nodes), _outputs(nodes), anchor, unreduced)


def find_regions(
    graph: fx.Graph, outside: frozenset[fx.Node] = frozenset(), unreduced: bool = False
) -> list[Region]:
    """The regions of a graph, none overlapping, in order. Nodes of `outside` are never part of one.

    With `unreduced`, scores that no reduction goes through make regions too.
    """
    taken: set[fx.Node] = set(outside)
    found: list[Region] = []
    places = {node: at for at, node in enumerate(graph.nodes)}
    # From the back, so that of two chained contractions the later one has the first choice.
    for node in reversed(list(graph.nodes)):
        if node in taken or name_of(node) not in CONTRACTIONS | WHOLE:
            continue
        region = region_at(node, places, taken, unreduced)
        if region is not None:
            found.append(region)
            taken |= set(region.nodes)
    return found[::-1]


#: The most operators of a graph that is read as one region.
_WHOLE = 32


def whole_region(graph: fx.Graph) -> Region | None:
    """A small graph as one region where something in it is reduced beside what products sum: a norm ahead of
    a product, a loss. None for another graph."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    (output,) = graph.find_nodes(op="output")
    results = [node for node in output.all_input_nodes if node in nodes]
    if not results or len(nodes) > _WHOLE or any(map(_is_mutable, nodes)):
        return None
    reduced = any(name_of(node) in REDUCTIONS | NORMS for node in nodes)
    return (
        region_of(tuple(nodes), results[-1]) if reduced and all(map(_has_tensor, nodes)) else None
    )


def region_at(
    anchor: fx.Node,
    places: dict[fx.Node, int],
    outside: set[fx.Node] | frozenset[fx.Node],
    unreduced: bool = False,
) -> Region | None:
    """The region whose last contraction is `anchor`; None where nothing reduced feeds it.

    With `unreduced`, scores may feed it as they are.
    """
    grown = _Growth(set(outside), unreduced)
    if name_of(anchor) in WHOLE:
        grown.region.add(anchor)
        grown.core.add(anchor)
        grown.light(anchor)
    elif not grown.contraction(anchor):
        return None
    grown.follow()
    grown.prune()
    nodes = tuple(sorted(grown.region, key=places.__getitem__))
    if anchor not in grown.region:
        return None
    return region_of(nodes, anchor, unreduced)


class _Growth:
    """A region while it grows. `core` has what lies between the first contractions and the last."""

    def __init__(self, outside: set[fx.Node], unreduced: bool) -> None:
        self.outside = outside
        self.unreduced = unreduced
        self.region: set[fx.Node] = set()
        self.core: set[fx.Node] = set()

    def contraction(self, anchor: fx.Node) -> bool:
        """Takes the anchor and, of its operands, those that a reduction of scores feeds."""
        self.region.add(anchor)
        fed = [arg for arg in anchor.all_input_nodes if self._is_reduced_scores(arg)]
        if not fed and self.unreduced and _is_batched(anchor):
            fed = [arg for arg in anchor.all_input_nodes if self._is_plain_scores(arg)]
        if not fed:
            return False
        for arg in fed:
            self._scores(arg)
        rest = [arg for arg in anchor.all_input_nodes if arg not in fed]
        self._moments(rest)
        self.light(anchor, [arg for arg in rest if arg not in self.region])
        self._siblings(anchor)
        starts = [n for n in self.region if name_of(n) in CONTRACTIONS and n is not anchor]
        ends = [n for n in starts if self._shares_scores(n)]
        reached = _reach(starts, lambda n: n.users, self.region)
        self.core = reached & (
            _reach([anchor, *ends], lambda n: n.all_input_nodes, self.region) | {anchor}
        )
        return True

    def _is_inside(self, node: fx.Node) -> bool:
        name = name_of(node)
        known = name in POINTWISE | REDUCTIONS | VIEWS | SPLITS | CREATION | MADE or _is_item(node)
        return known and node not in self.outside and _has_tensor(node) and not _is_mutable(node)

    def _is_reduced_scores(self, node: fx.Node) -> bool:
        """Whether a contraction reaches this value through a reduction."""
        work, seen = [(node, False)], set()
        while work:
            item = work.pop()
            if item in seen:
                continue
            seen.add(item)
            at, reduced = item
            if name_of(at) in CONTRACTIONS and at not in self.outside:
                if reduced:
                    return True
                continue
            if self._is_inside(at):
                now = reduced or name_of(at) in REDUCTIONS
                work += [(arg, now) for arg in at.all_input_nodes]
        return False

    def _is_plain_scores(self, node: fx.Node) -> bool:
        """Whether this value is computed point by point from one contraction along a batch.

        A layer with weights, whose features are no scores, has no batch: its weights are a matrix.
        """
        between = _reach([node], lambda n: n.all_input_nodes, self._is_inside)
        made = {arg for each in between for arg in each.all_input_nodes}
        starts = [n for n in made if name_of(n) in CONTRACTIONS and n not in self.outside]
        kinds = {name_of(each) for each in between}
        return len(starts) == 1 and _is_batched(starts[0]) and bool(kinds & POINTWISE)

    def _scores(self, node: fx.Node) -> None:
        work = [node]
        while work:
            at = work.pop()
            if at in self.region or at in self.outside:
                continue
            if name_of(at) in CONTRACTIONS:
                self.region.add(at)
                self.light(at)
            elif self._is_inside(at):
                self.region.add(at)
                work += at.all_input_nodes

    def _moments(self, operands: Iterable[fx.Node]) -> None:
        """Takes what lies between an operand and contractions of the same scores: (v - p @ v) ** 2."""
        found: set[fx.Node] = set()
        for operand in operands:
            between = _reach([operand], lambda n: n.all_input_nodes, self._is_inside)
            ends = {
                arg
                for node in between
                for arg in node.all_input_nodes
                if name_of(arg) in CONTRACTIONS and self._shares_scores(arg)
            }
            found |= ends | _reach(ends, lambda n: n.users, between | ends)
        self.region |= found
        for node in found:
            if name_of(node) in CONTRACTIONS:
                self.light(node)

    def _shares_scores(self, node: fx.Node) -> bool:
        """Whether a contraction reads reduced scores that are in the region."""
        return node not in self.outside and any(
            arg in self.region and self._is_reduced_scores(arg) for arg in node.all_input_nodes
        )

    def _siblings(self, anchor: fx.Node) -> None:
        """Takes contractions beside the anchor, of the same scores and of nothing that follows from them."""
        for node in list(self.region - {anchor}):
            for user in node.users:
                if user in self.region or name_of(user) not in CONTRACTIONS:
                    continue
                others = [arg for arg in user.all_input_nodes if arg not in self.region]
                behind = _reach(others, lambda n: n.all_input_nodes, lambda _: True)
                if self._shares_scores(user) and not behind & self.region:
                    self.region.add(user)
                    self.light(user)

    def light(self, node: fx.Node, operands: Iterable[fx.Node] | None = None) -> None:
        """Takes what only rearranges, scales or dequantizes the operands of a contraction."""
        work = list(node.all_input_nodes if operands is None else operands)
        while work:
            at = work.pop()
            if at in self.region or not self._is_inside(at) or not _is_light(at):
                continue
            if self._only_here(at):
                self.region.add(at)
                work += at.all_input_nodes

    def _only_here(self, node: fx.Node) -> bool:
        return all(user in self.region for user in node.users)

    def follow(self) -> None:
        """Takes what is computed point by point, or reduced, from the region alone."""
        work = [user for node in self.core for user in node.users]
        taken: set[fx.Node] = set()
        while work:
            at = work.pop()
            if at in self.region or not self._is_inside(at):
                continue
            if not all(arg in self.core for arg in at.all_input_nodes):
                continue
            self.region.add(at)
            self.core.add(at)
            taken.add(at)
            work += at.users
        # What only rearranges a result is left to whoever reads it.
        while True:
            loose = [
                n for n in taken if _is_view(n) and not any(user in self.region for user in n.users)
            ]
            if not loose:
                return
            for node in loose:
                taken.discard(node)
                self.core.discard(node)
                self.region.discard(node)

    def prune(self) -> None:
        """Lets go of masks and operands that others use too: they are computed once, outside."""
        while True:
            shared = [
                node
                for node in self.region - self.core
                if not self._only_here(node) or not _is_used(node, self.region)
            ]
            if not shared:
                return
            self.region -= set(shared)


def _reach(
    starts: Iterable[fx.Node],
    step: Callable[[fx.Node], Iterable[fx.Node]],
    within: set[fx.Node] | Callable[[fx.Node], bool],
) -> set[fx.Node]:
    """All nodes that steps lead to without leaving `within`."""
    inside = within.__contains__ if isinstance(within, set) else within
    found: set[fx.Node] = set()
    work = list(starts)
    while work:
        at = work.pop()
        if at not in found and inside(at):
            found.add(at)
            work += step(at)
    return found


def _is_batched(node: fx.Node) -> bool:
    """Whether both operands of a contraction have dimensions beside those of matrices."""
    values = [arg.meta.get("val") for arg in node.all_input_nodes]
    return all(isinstance(value, torch.Tensor) and value.ndim > 2 for value in values)


def _is_used(node: fx.Node, region: set[fx.Node]) -> bool:
    return any(user in region for user in node.users)


def _is_item(node: fx.Node) -> bool:
    made = node.target is operator.getitem and name_of(node.args[0])  # type: ignore[arg-type]
    return made in REDUCTIONS | SPLITS


def _is_view(node: fx.Node) -> bool:
    made = node.args[0] if node.target is operator.getitem else node
    return name_of(made) in VIEWS | SPLITS  # type: ignore[arg-type]


def _has_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(first, torch.Tensor)


def _is_mutable(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and bool(target._schema.is_mutable)


def _is_light(node: fx.Node) -> bool:
    name = name_of(node)
    if name in VIEWS or _of_integers(node):
        return True
    return name in ("mul", "div") and not isinstance(node.args[1], fx.Node)


def _of_integers(node: fx.Node, depth: int = 6) -> bool:
    """Whether a point-by-point value starts from whole numbers: it dequantizes."""
    if depth == 0 or name_of(node) not in POINTWISE | VIEWS:
        return False
    for arg in node.all_input_nodes:
        value = arg.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype in _WHOLE_NUMBERS:
            return True
        if _of_integers(arg, depth - 1):
            return True
    return False


_WHOLE_NUMBERS = {torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64}


def _inputs(nodes: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    inside = set(nodes)
    return tuple(
        dict.fromkeys(arg for n in nodes for arg in n.all_input_nodes if arg not in inside)
    )


def _outputs(nodes: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    inside = set(nodes)
    return tuple(node for node in nodes if any(user not in inside for user in node.users))
