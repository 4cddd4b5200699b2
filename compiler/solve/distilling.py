"""Has the solved weights of a model tuned together, by what the original says of a text.

The original reads the text once, up to its head; what it says of the next tokens follows from there as often
as it is asked for. The stored model reads a part without anything that can be derived, and what is between
its layers is held; then its head and its layers, the last one first, read theirs once more, and are derived
by what the next asks for (gradient checkpointing, Chen et al. 2016). So one layer is held in float32, and
what it computes of a part. What an interrupted run needs to go on is kept in a folder.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional
from torch.utils import _pytree as pytree

from ...errors import CalibrationError
from ..calibrate.snapshot import all_inputs
from ..calibrate.stream import Tell, keep_found, kept_found, time_left
from ..ir.heap import give_back
from ..ir.interpreter import Interpreter, Run
from ..ir.ops.record import seen_through
from ..ir.program import Program
from .solver import Solved, Stored, relative_error
from .tuning import Tuning, layers

#: Numbers of logits that are derived at a time, by each of which some 16 bytes are held.
_LOGITS = 1 << 26

#: Seconds between two states that are kept.
_EVERY = 60.0

_FOUND, _STATE = "model.pt", "progress.pt"

#: Values by the names of their nodes.
Values = Mapping[str, Any]

#: Gives a weight [N, M] by its name.
Weights = Callable[[str], Tensor]


class Distilling(Tuning):
    """Tunes the weights of all layers, the head's and the table's together."""

    def run(self, parts: Sequence[Tensor], folder: Path | None, tell: Tell) -> None:
        begun = {name: self.solved[name] for name in self._schemes if self._tunes(name)}
        path = None if folder is None else folder / _FOUND
        done = self._kept(path, begun)
        if done is None:
            weights = {
                name: Stored(self._schemes[name], solved, self._program.weights[name].shape[-1])
                for name, solved in begun.items()
            }
            model = _Model(self._program, weights, self._met, self._split(parts), folder, tell)
            done = {n: self._measured(n, s) for n, s in self._solver.distill(model).items()}
            if self._keep(path, done):
                model.forget()
        self.solved |= done

    def _split(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The text in parts that have not too many logits."""
        results: Any = self._program.output.args[0]
        logits = dict(zip(self._program.output_names(), results, strict=True))
        words = logits[_result(self._program)].meta["val"].shape[-1]
        rows = max(1, _LOGITS // (words * parts[0].shape[1]))
        return [some for part in parts for some in part.split(rows)]

    def _met(self, name: str) -> Tensor | None:
        """A weight as it is stored; None where it stays as it comes."""
        return self._stored(name) if name in self.solved else None

    def _measured(self, name: str, solved: Solved) -> Solved:
        target = self._target(name)
        restored = self._schemes[name].dequantize(solved.pieces, target.shape[-1])
        return replace(solved, error=relative_error(restored, target))


class _Segment(NamedTuple):
    """The nodes up to `stop`, from `first`, or from the beginning; the weights that they read."""

    first: fx.Node | None
    stop: fx.Node
    reads: tuple[str, ...]


class _Model:
    """A `Whole`: the model as a solver has it, and what the original says."""

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Stored],
        stored: Callable[[str], Tensor | None],
        parts: Sequence[Tensor],
        folder: Path | None,
        tell: Tell,
    ) -> None:
        self.weights, self.parts = weights, len(parts)
        self._stored, self._folder, self._tell = stored, folder, tell
        self._inputs = [all_inputs(program, part) for part in parts]
        self._segments, self._result = _segments(program), _result(program)
        counts = Counter(name for segment in self._segments for name in segment.reads)
        self._shared = [name for name, count in counts.items() if count > 1]
        self._held: dict[str, Tensor] = {}
        self._plain = Interpreter(program, kept=self._held)
        self._derived = Interpreter(
            program, instead=seen_through(), kept=self._held, gradients=True
        )
        self._original = Interpreter(program, keep_weights=False)
        self._told = self._begun = time.monotonic()
        self._done: int | None = None
        self._wanted = self._read(program)

    def _read(self, program: Program) -> list[Values]:
        """What the original has of each part in front of its head."""
        weights: dict[str, Tensor] = {}
        original = Interpreter(program, kept=weights)
        runs = [Run(original, inputs) for inputs in self._inputs]
        for segment in self._segments[:-1]:
            for run in runs:
                run.until(segment.stop)
            weights.clear()
            give_back()
        return [run.known for run in runs]

    def lost(self, weight: Weights, parts: Sequence[int]) -> float:
        tokens = total = 0.0
        for part in parts:
            *_, values = self._forward(weight, part)
            self._fill(self._segments[-1], weight)
            with torch.no_grad():
                lost = float(self._off(self._plain, values, part))
            count = self._inputs[part]["input_ids"].numel()
            tokens, total = tokens + count, total + lost * count
            self._held.clear()
        return total / tokens

    def slopes(self, weight: Weights, part: int) -> Iterator[tuple[str, Tensor]]:
        before = self._forward(weight, part)
        asked: dict[tuple[str, int], Tensor] = {}
        for segment in reversed(self._segments):
            known = {name: pytree.tree_map(_leaf, value) for name, value in before.pop().items()}
            values = _derivable(known)
            leaves = self._fill(segment, weight)
            if segment is self._segments[-1]:
                ends, sizes = [self._off(self._derived, known, part)], [torch.ones(())]
                if not bool(torch.isfinite(ends[0])):
                    raise CalibrationError(
                        "the model's logits are not finite any more on the calibration text, since its "
                        "scales moved: give distill a smaller rate"
                    )
            else:
                run = Run(self._derived, self._inputs[part], segment.first, known)
                run.until(segment.stop)
                made = _derivable(run.known)
                names = [name for name in asked if name in made]
                ends, sizes = [made[n] for n in names], [asked[n] for n in names]
            if not ends:  # nothing of what comes behind depends on it
                break
            wanted = [*values.values(), *leaves.values()]
            found = torch.autograd.grad(ends, wanted, sizes, allow_unused=True)
            asked = {n: slope for n, slope in zip(values, found, strict=False) if slope is not None}
            for name, slope in zip(leaves, found[len(values) :], strict=True):
                if slope is not None:
                    yield name, slope
        self._held.clear()

    def kept(self) -> dict[str, Tensor]:
        return (None if self._folder is None else kept_found(self._folder / _STATE)) or {}

    def keep(self, found: Callable[[], dict[str, Tensor]], done: int, left: int) -> None:
        if self._done is None:  # the first is no measure
            self._done, self._begun = done, time.monotonic()
        text = f"distilling{time_left(self._begun, done - self._done, left)}"
        self._tell(text, done / (done + left))
        if self._folder is not None and time.monotonic() - self._told > _EVERY:
            keep_found(found(), self._folder / _STATE)
            self._told = time.monotonic()

    def forget(self) -> None:
        """Of what was kept on the way."""
        if self._folder is not None:
            with suppress(OSError):
                (self._folder / _STATE).unlink(missing_ok=True)

    def _forward(self, weight: Weights, part: int) -> list[Values]:
        """What is known in front of each segment of a part, as the model has it."""
        self._held.update({name: self._asked(name, weight) for name in self._shared})
        run = Run(self._plain, self._inputs[part])
        before: list[Values] = [{}]
        for segment in self._segments[:-1]:
            self._fill(segment, weight)
            run.until(segment.stop)
            before.append(run.known)
        return before

    def _fill(self, segment: _Segment, weight: Weights) -> dict[str, Tensor]:
        """Holds the weights that a segment reads, beside those that several read; gives those that can be
        derived by."""
        shared = {name: self._held[name].detach() for name in self._shared}
        self._held.clear()
        self._held.update(shared)
        self._held.update({n: self._asked(n, weight) for n in segment.reads if n not in shared})
        return {n: self._held[n].requires_grad_() for n in segment.reads if n in self.weights}

    def _asked(self, name: str, weight: Weights) -> Tensor:
        if name in self.weights:
            return weight(name).detach()
        stored = self._stored(name)
        return self._original.weight(name) if stored is None else stored

    def _off(self, interpreter: Interpreter, known: Values, part: int) -> Tensor:
        """KL of the original and the model behind what is known in front of the head, a mean over tokens."""
        first, inputs = self._segments[-1].first, self._inputs[part]
        with torch.no_grad():
            wanted = Run(self._original, inputs, first, self._wanted[part]).results()[self._result]
        found = Run(interpreter, inputs, first, known).results()[self._result]
        return functional.kl_div(
            found.flatten(0, -2).log_softmax(-1),
            wanted.flatten(0, -2).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )


def _segments(program: Program) -> list[_Segment]:
    """The layers, and what comes behind them."""
    spans, nodes = layers(program), [*program.graph.nodes]
    stops = [*(span.stop for span in spans), program.output]
    firsts = [None, *stops[:-1]]
    found = []
    for first, stop in zip(firsts, stops, strict=True):
        begin = 0 if first is None else nodes.index(first)
        within = {*nodes[begin : nodes.index(stop)]}
        reads = [
            str(node.target)
            for node in program.graph.find_nodes(op="get_attr")
            if not within.isdisjoint(node.users)
        ]
        found.append(_Segment(first, stop, tuple(dict.fromkeys(reads))))
    return found


def _result(program: Program) -> str:
    """The name of the logits among the outputs."""
    names = program.output_names()
    return "logits" if "logits" in names else names[0]


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        return value.detach().requires_grad_()
    return value


def _derivable(values: Values) -> dict[tuple[str, int], Tensor]:
    """What can be derived by or from; a value may be several tensors."""
    return {
        (name, place): each
        for name, value in values.items()
        for place, each in enumerate(pytree.tree_leaves(value))
        if isinstance(each, Tensor) and each.requires_grad
    }
