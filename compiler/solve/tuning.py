"""Has solved weights tuned layer by layer, so that the linears of a layer make up for each other.

The text goes through the model twice, side by side: through the original, and through the model as it comes
to be stored. Both stop in front of each layer. A solver is given how far what the layer makes of the latter
text is from what it makes of the former, and how that changes with its weights (`solver.Layer`); so what was
lost before is made up for too, as far as the weights of a layer can. What was tuned is kept in a folder; a
run that was interrupted reads the layers that are done once more, and goes on behind them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...errors import CalibrationError
from ..calibrate.snapshot import all_inputs, copied
from ..calibrate.stream import Tell, keep_found, kept_found, time_left
from ..ir.heap import give_back
from ..ir.interpreter import Interpreter, Run
from ..ir.ops.record import seen_through
from ..ir.program import Program, attention_nodes
from ..ir.quant.scheme import Scheme
from .solver import Begun, Solved, Solver, as_found, from_found


@dataclass(frozen=True)
class Span:
    """The nodes of a layer, from `first` up to `stop`, where the next begins."""

    first: fx.Node
    stop: fx.Node
    nodes: tuple[fx.Node, ...]


def layers(program: Program) -> list[Span]:
    """The layers of a program: each holds one attention, and ends where the fewest numbers a token are needed
    behind it, as late as that may be. What comes behind the last one, such as the head, is of none."""
    nodes = [*program.graph.nodes]
    place = {node: index for index, node in enumerate(nodes)}
    width = _live(nodes, place)
    attention = [place[node] for node in attention_nodes(program)]
    stops, ends = [], [*attention[1:], len(nodes) - 1][: len(attention)]
    for begin, end in zip(attention, ends, strict=True):
        stop = min(range(begin + 1, end + 1), key=lambda at: (width[at], -at))
        while nodes[stop - 1].op == "get_attr":  # what is read there is the next layer's
            stop -= 1
        stops.append(stop)
    begins = [0, *stops][: len(stops)]
    return [
        Span(nodes[begin], nodes[stop], tuple(nodes[begin:stop]))
        for begin, stop in zip(begins, stops, strict=True)
    ]


def read_where_used(program: Program) -> None:
    """Has each weight read right in front of the first that needs it, so that its layer reads it."""
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    for read in program.graph.find_nodes(op="get_attr"):
        if read.users:
            min(read.users, key=place.__getitem__).prepend(read)


def _live(nodes: Sequence[fx.Node], place: Mapping[fx.Node, int]) -> list[int]:
    """For each node the numbers a token that are there before it and needed at it, or behind it."""
    change = [0] * (len(nodes) + 2)
    for index, node in enumerate(nodes):
        if node.op == "get_attr" or not node.users:
            continue
        value = node.meta.get("val")
        made = value if isinstance(value, (tuple, list)) else (value,)
        shapes = [each.shape for each in made if isinstance(each, Tensor)]
        numbers = sum(
            math.prod(size for size in shape if isinstance(size, int)) for shape in shapes
        )
        change[index + 1] += numbers
        change[max(place[user] for user in node.users) + 1] -= numbers
    total, found = 0, []
    for index in range(len(nodes)):
        total += change[index]
        found.append(total)
    return found


class Tuning:
    """The weights of a program that are solved, to be tuned by a solver on a text."""

    def __init__(
        self,
        program: Program,
        solver: Solver,
        schemes: Mapping[str, Scheme],
        solved: Mapping[str, Solved],
    ) -> None:
        self._program, self._solver, self._schemes = copied(program), solver, schemes
        read_where_used(self._program)
        self.solved = dict(solved)

    def run(self, parts: Sequence[Tensor], folder: Path | None, tell: Tell) -> None:
        """Reads the text; `solved` are then the tuned ones. Raises CalibrationError where it gives no usable
        numbers."""
        raise NotImplementedError

    def _tunes(self, name: str) -> bool:
        """Whether a weight that is solved can be tuned."""
        two = len(self._program.weights[name].shape) == 2
        return two and not self._solver.refuses(self._schemes[name])

    def _target(self, name: str) -> Tensor:
        """What is stored of a weight, before it is."""
        weight, channels = self._program.weights[name].load().float(), self.solved[name].channels
        return weight if channels is None else weight * channels

    def _stored(self, name: str) -> Tensor:
        """A weight that is solved, as its inputs as they are meet it."""
        solved, shape = self.solved[name], self._program.weights[name].shape
        return solved.met(self._schemes[name].dequantize(solved.pieces, shape[-1]))

    def _keep(self, path: Path | None, tuned: Mapping[str, Solved]) -> bool:
        found: dict[str, Tensor] = {}
        for name, solved in tuned.items():
            found |= as_found(name, solved)
        return path is not None and keep_found(found, path)

    def _kept(self, path: Path | None, begun: Mapping[str, Solved]) -> dict[str, Solved] | None:
        """Those of some weights that were tuned before, where that was kept."""
        found = None if path is None else kept_found(path)
        if found is None:
            return None
        return {
            name: from_found(found, name, each.pieces)
            for name, each in begun.items()
            if found.keys() >= as_found(name, each).keys()
        }


class LayerByLayer(Tuning):
    """Tunes the weights of a layer together, and goes on to the next."""

    def run(self, parts: Sequence[Tensor], folder: Path | None, tell: Tell) -> None:
        spans, started, before = layers(self._program), time.monotonic(), 0
        reading = _Reading(self._program, parts)
        for index, span in enumerate(spans):
            begun, stored = self._begun(span), self._stored_in(span)
            reading.come_to(span, begun, stored)
            path = None if folder is None else folder / f"layer-{index}.pt"
            done = self._kept(path, {name: each.solved for name, each in begun.items()})
            if done is None and begun:
                tell(
                    f"tuning layers{time_left(started, index - before, len(spans) - index)}",
                    index / len(spans),
                )
                done = self._solver.tune(reading)
                self._keep(path, done)
            elif index == before:
                before += 1  # what is read once more says nothing of the time that tuning takes
            self.solved |= done or {}
            reading.go_on(stored | {name: self._stored(name) for name in done or {}})

    def _begun(self, span: Span) -> dict[str, Begun]:
        """The weights that this layer alone reads, and that can be tuned."""
        within = {*span.nodes}
        return {
            name: Begun(self._schemes[name], self.solved[name], self._target(name))
            for name in self._solved_in(span)
            if self._tunes(name) and self._read_by(name) <= within
        }

    def _solved_in(self, span: Span) -> list[str]:
        """The solved weights that a layer reads, in the order of the graph, which may name them before it."""
        within = {*span.nodes}
        names = dict.fromkeys(str(n.target) for n in self._program.graph.find_nodes(op="get_attr"))
        return [n for n in names if n in self.solved and not within.isdisjoint(self._read_by(n))]

    def _read_by(self, name: str) -> set[fx.Node]:
        reads = self._program.graph.find_nodes(op="get_attr", target=name)
        return {user for read in reads for user in read.users}

    def _stored_in(self, span: Span) -> dict[str, Tensor]:
        """The weights that a layer reads as they are stored."""
        return {name: self._stored(name) for name in sorted(self._solved_in(span))}


class _Reading:
    """The text in front of a layer, as the original has it behind and the stored model before: a `Layer`."""

    def __init__(self, program: Program, parts: Sequence[Tensor]) -> None:
        self.weights: Mapping[str, Begun] = {}
        self.parts = len(parts)
        self._inputs = [all_inputs(program, part) for part in parts]
        self._plain: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}
        self._tried: dict[str, Tensor] = {}
        original = Interpreter(program, kept=self._plain)
        own = Interpreter(program, kept=self._held)
        self._original = [Run(original, inputs) for inputs in self._inputs]
        self._own = [Run(own, inputs) for inputs in self._inputs]
        self._trial = Interpreter(program, kept=self._tried)
        self._derived = Interpreter(
            program, instead=seen_through(), kept=self._tried, gradients=True
        )

    def come_to(
        self, span: Span, weights: Mapping[str, Begun], stored: Mapping[str, Tensor]
    ) -> None:
        """Stands in front of a layer; the original is read behind it."""
        self._span, self.weights = span, weights
        self._tried.update(stored)
        for run in self._original:
            run.until(span.stop)
        self._plain.clear()
        give_back()

    def go_on(self, stored: Mapping[str, Tensor]) -> None:
        """Reads the layer with its weights as they are stored."""
        self._held.update(stored)
        for run in self._own:
            run.until(self._span.stop)
        self._held.clear()
        self._tried.clear()
        give_back()

    def lost(self, weights: Mapping[str, Tensor], parts: Sequence[int]) -> float:
        tokens = total = 0.0
        for part in parts:
            with torch.no_grad():
                lost = self._lost(self._trial, weights, part)
            count = self._inputs[part]["input_ids"].numel()
            tokens, total = tokens + count, total + float(lost) * count
        return total / tokens

    def slopes(self, weights: Mapping[str, Tensor], parts: Sequence[int]) -> dict[str, Tensor]:
        found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for part in parts:
            leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            slopes = torch.autograd.grad(
                self._lost(self._derived, leaves, part), [*leaves.values()]
            )
            for name, slope in zip(leaves, slopes, strict=True):
                found[name] += slope / len(parts)
        return found

    def _lost(self, interpreter: Interpreter, weights: Mapping[str, Tensor], part: int) -> Tensor:
        self._tried.update(weights)
        run = Run(interpreter, self._inputs[part], self._span.first, self._own[part].known)
        run.until(self._span.stop)
        wanted = self._original[part].values
        made = {*self._span.nodes}
        lost = [
            _off(value, want)
            for node, values in run.values.items()
            if node in made
            for value, want in zip(
                pytree.tree_leaves(values), pytree.tree_leaves(wanted[node]), strict=True
            )
            if isinstance(value, Tensor) and value.dtype.is_floating_point and value.dim() > 1
        ]
        found = torch.stack(lost).mean()
        if not bool(torch.isfinite(found)):
            raise CalibrationError(
                f"what %{self._span.stop.name} reads is not finite on the calibration text: the model's "
                "weights are damaged, or overflow in float32"
            )
        return found


def _off(value: Tensor, wanted: Tensor) -> Tensor:
    """How far values [.., M] are off, squared, as a share of what they should be squared; its mean."""
    off = (value - wanted).square().sum(-1)
    return (off / wanted.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)).mean()
