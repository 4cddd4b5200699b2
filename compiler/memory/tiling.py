"""Steps of many tokens in tiles: what sees one token at a time is computed of some tokens at a time.

Between two calls of attention most calls do: projections, norms, activations. A stretch of these gives for
some of its rows what it gives for all, and what lies between its first and its last call then takes the
memory of a tile:

    Before: %n = norm(%x); %g = linear(%n); %h = act(%g); %d = linear(%h)
    After:  %x0 = slice(%x); %n0 = norm(%x0); .. %d0 = linear(%h0); %x1 = slice(%x); .. %d = cat(%d0, %d1, ..)

The tiles are written where the whole lies (`joining.py`). A stretch ends where the fewest bytes are live,
which is where a layer adds to the residual stream.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.ops.norm import AddLayerNorm, AddRmsNorm, LayerNorm, RmsNorm
from ..ir.ops.record import Operator, operator_of
from ..ir.program import Program, call_arguments
from .expand import expand
from .planning import MemoryPlan, plan_memory
from .survey import Survey, survey

aten = torch.ops.aten

#: Tokens of a step from which on it goes in tiles, how many tiles there are at most, and rows that each has
#: at least: where it has fewer, products of matrices may round otherwise than those of all rows.
MANY, TILES, ROWS = 64, 16, 16

#: Norms behind a sum, and the norm alone: apart, a stretch can end at the sum.
_JOINT: dict[type[Operator], type[Operator]] = {AddRmsNorm: RmsNorm, AddLayerNorm: LayerNorm}


@dataclass(frozen=True)
class Stretch:
    """Calls, one behind the other, that see one token at a time."""

    nodes: tuple[fx.Node, ...]
    lead: tuple[int, ...]
    """The sizes of all axes of its values but the last."""

    @property
    def axis(self) -> int:
        """The axis that is cut: the first with more than one row, so that a tile is one block of memory."""
        return next(at for at, size in enumerate(self.lead) if size > 1)

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """Where each tile begins and ends, along the rows of a batch, or the tokens of one. The last one has
        what is left beside."""
        size = self.lead[self.axis]
        beneath = math.prod(self.lead[self.axis + 1 :])
        unit = ROWS // math.gcd(ROWS, beneath)
        step = unit * -(-size // (unit * TILES))
        starts = range(0, max(1, size - unit + 1), step)
        return list(pairwise((*starts, size)))


def tiled(program: Program, inputs: Mapping[str, Tensor]) -> Program:
    """The program as it holds the fewest bytes for inputs of these shapes: stretches in tiles where that
    lowers the peak of live bytes, the program itself where it does not or tokens are few."""
    apart = _sums_apart(program)
    runs = _runs(apart, survey(apart, inputs))
    if not runs:  # of few tokens nothing is planned twice
        return program
    found = plan_memory(apart, inputs)
    stretches = [part for run in runs for part in _cut(run, found)]
    within = {found.steps[node] for stretch in stretches for node in stretch.nodes}
    beside = max((live for at, live in enumerate(found.live) if at not in within), default=0)
    stretches = [each for each in stretches if _live(each, found) > beside]
    if not stretches:
        return program
    written = _write(apart, stretches, found.survey)
    return written if plan_memory(written, inputs).bound < found.bound else program


def planned(program: Program, inputs: Mapping[str, Tensor]) -> tuple[Program, MemoryPlan]:
    """The program in calls of torch's operators for inputs of these shapes, in tiles where the arena is
    smaller then, and its plan."""
    programs = [expand(program, inputs)]
    if (cut := tiled(program, inputs)) is not program:
        programs.append(expand(cut, inputs))
    plans = [(each, plan_memory(each, inputs)) for each in programs]
    return min(plans, key=lambda each: each[1].arena)


def _sums_apart(program: Program) -> Program:
    """The same program with norms behind a sum in two calls, which is what they mean."""
    graph = fx.Graph()
    new: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        kind = operator_of(node.target)
        if kind in _JOINT:
            x, residual, *others = (new.get(each, each) for each in call_arguments(node).values())
            total = graph.call_function(aten.add.Tensor, (x, residual))
            norm = graph.call_function(_JOINT[kind].overload(), (total, *others))
            new[node] = norm, total
        elif node.target is operator.getitem and isinstance(new[node.args[0]], tuple):
            new[node] = new[node.args[0]][node.args[1]]
        else:
            new[node] = graph.node_copy(node, lambda source: new[source])
    return replace(program, graph=graph)


def _runs(program: Program, found: Survey) -> list[Stretch]:
    """The longest stretches over many tokens."""
    nodes = (node for node in program.graph.nodes if node.op != "get_attr")
    runs = groupby(nodes, lambda node: _rows(node, found))
    return [Stretch(tuple(run), lead) for lead, run in runs if lead is not None]


def _rows(node: fx.Node, found: Survey) -> tuple[int, ...] | None:
    """The leading sizes of a call that gives row by row what it reads row by row; None for all others."""
    read = _read_by_rows(node)
    others = [each for each in node.all_input_nodes if each not in read and each.op != "get_attr"]
    shape = [each for each in others if isinstance(found.values[each], int)]
    if not read or len(shape) < len(others):
        return None
    values = [value for each in (*read, node) for value in found.results(each)]
    lead = min((tuple(value.shape[:-1]) for value in values), key=len)
    alike = all(
        tuple(value.shape[: len(lead)]) == lead
        and (value.ndim == len(lead) + 1 or node.target is aten.reshape.default)
        for value in values
    )
    return lead if alike and math.prod(lead) >= MANY else None


def _read_by_rows(node: fx.Node) -> list[fx.Node]:
    """The arguments of which a row of what a call gives depends on the same row alone."""
    target, first = node.target, [each for each in node.args[:1] if isinstance(each, fx.Node)]
    kind = operator_of(target)
    if kind is not None:
        given = call_arguments(node)
        return [given[name] for name in kind.by_rows]
    if target in (operator.getitem, aten.reshape.default):
        return first
    if target is aten.split_with_sizes.default and call_arguments(node)["dim"] == -1:
        return first
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return [each for each in node.all_input_nodes if each.op != "get_attr"]
    return []


def _cut(run: Stretch, plan: MemoryPlan) -> list[Stretch]:
    """A stretch in parts, each from one place where the fewest bytes are live to the next."""
    first = plan.steps[run.nodes[0]]
    places = [first, *(plan.steps[node] + 1 for node in run.nodes)]
    held = [_held_ahead(place, plan) for place in places]
    ends = [at for at, size in enumerate(held) if size == min(held)]
    bounds = sorted({0, *ends, len(run.nodes)})
    parts = (run.nodes[start:end] for start, end in pairwise(bounds))
    cut = [Stretch(part, run.lead) for part in map(partial(_trimmed, plan), parts) if part]
    return [each for each in cut if len(each.tiles) > 1]


def _trimmed(plan: MemoryPlan, part: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """Without what only looks at others at its ends, and nothing where that leaves one call."""
    found, nodes = plan.survey, list(part)
    while nodes and found.looks(nodes[-1]):
        nodes.pop()
    while nodes and found.looks(nodes[0]):
        del nodes[0]
    return tuple(nodes) if len(nodes) > 1 else ()


def _held_ahead(step: int, plan: MemoryPlan) -> int:
    """Bytes that are live ahead of a step."""
    return sum(each.size for each in plan.buffers if each.start < step < each.end)


def _live(stretch: Stretch, plan: MemoryPlan) -> int:
    """The most bytes that are live while a stretch runs as a whole."""
    first, last = plan.steps[stretch.nodes[0]], plan.steps[stretch.nodes[-1]]
    return max(plan.live[first : last + 1])


def _write(program: Program, stretches: Sequence[Stretch], found: Survey) -> Program:
    """The program with these stretches in tiles."""
    last = {stretch.nodes[-1]: stretch for stretch in stretches}
    within = {node for stretch in stretches for node in stretch.nodes}
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node not in within:
            new[node] = graph.node_copy(node, lambda source: new[source])
        elif node in last:
            _write_tiles(graph, last[node], new, found)
    return replace(program, graph=graph)


def _write_tiles(
    graph: fx.Graph, stretch: Stretch, new: dict[fx.Node, fx.Node], found: Survey
) -> None:
    axis = stretch.axis
    given = [node for node in stretch.nodes if set(node.users) - set(stretch.nodes)]
    tiles: dict[fx.Node, list[fx.Node]] = {node: [] for node in given}
    for start, end in stretch.tiles:
        here: dict[fx.Node, fx.Node] = {}
        for node in stretch.nodes:
            for source in _read_by_rows(node):
                if source not in here:
                    rows = new[source], axis, start, end
                    here[source] = graph.call_function(aten.slice.Tensor, rows)
            if node.target is aten.reshape.default:
                shape = list(found.values[node].shape)
                shape[axis] = end - start
                source = here[_read_by_rows(node)[0]]
                here[node] = graph.call_function(aten.reshape.default, (source, shape))
            else:
                here[node] = graph.node_copy(node, lambda s: here[s] if s in here else new[s])  # noqa: B023
        for node in given:
            tiles[node].append(here[node])
    for node in given:
        new[node] = graph.call_function(aten.cat.default, (tiles[node], axis))
