"""Runs of one plan that a device has captured: their launches are made by one call from then on.

What a run in an arena launches is the same in every run over the same inputs: shapes are the plan's, results
lie where it has them, and what changes from step to step stands in memory that kernels read. So where inputs
lie where they lay before, Python need not say it all again. CUDA calls such a list of launches a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from ..ir.interpreter import Run
from ..ir.ops.record import operator_of
from ..ir.program import Program
from .expand import INSTEAD
from .survey import number

#: Captured runs of one plan that are kept: one for each cache that takes turns with others.
KEPT = 4


class Capture(Protocol):
    """What captures launches."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """What makes all launches of a run again. The run itself launches nothing meanwhile.

        Raises RuntimeError where it asks for what tensors hold.
        """


class Captured:
    """Runs of one plan, each over inputs of its own places."""

    def __init__(self, capture: Capture, program: Program) -> None:
        self._capture: Capture | None = capture if may_be_captured(program) else None
        self._replays: dict[tuple[int, ...], _Replay | None] = {}

    def results(self, inputs: Mapping[str, Tensor], begin: Callable[[], Run]) -> dict[str, Tensor]:
        """The outputs by name of a run that `begin` begins.

        Over inputs that lie in new places it is run as ever, which compiles what is launched for the first
        time; the second run is captured, and replayed from then on.
        """
        if self._capture is None:
            return begin().results()
        places = tuple(each.data_ptr() for each in inputs.values())
        known = places in self._replays
        replay = self._replays.pop(places, None)
        if known and replay is None:
            replay = self._captured(inputs, begin)
        if self._capture is not None:
            self._replays[places] = replay  # last: what was used longest ago goes first
            if len(self._replays) > KEPT:
                del self._replays[next(iter(self._replays))]
        return begin().results() if replay is None else replay(inputs)

    def _captured(self, inputs: Mapping[str, Tensor], begin: Callable[[], Run]) -> _Replay | None:
        """A run that was captured; None, and never again, where this plan's cannot be."""
        assert self._capture is not None
        found: dict[str, Tensor] = {}
        try:
            launch = self._capture.capture(lambda: found.update(begin().results()))
            return _Replay(launch, found, inputs)
        except RuntimeError:  # want of memory too: what is run as ever may do with less
            self._capture = None
            self._replays.clear()
            return None


class _Replay:
    """A captured run. It holds what the run made and none of its inputs, so that a cache goes when its owner
    lets go of it."""

    def __init__(
        self,
        launch: Callable[[], None],
        results: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
    ) -> None:
        """Raises RuntimeError where a result is a part of an input."""
        self._launch = launch
        names = {number(each): name for name, each in inputs.items()}
        self._results: dict[str, Tensor | str] = {}
        for name, result in results.items():
            of = names.get(number(result))
            if of is not None and _lies(result) != _lies(inputs[of]):
                raise RuntimeError(f"{name} is a part of {of}")
            self._results[name] = result if of is None else of

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._launch()
        return {
            name: inputs[each] if isinstance(each, str) else each
            for name, each in self._results.items()
        }


def _lies(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def may_be_captured(program: Program) -> bool:
    """Whether each call of an expanded program is known launch by launch. One that was left whole may ask
    what its tensors hold, which is not there while launches are captured."""
    return not any(
        INSTEAD in node.meta or operator_of(node.target) is not None
        for node in program.graph.nodes
        if node.op == "call_function"
    )
