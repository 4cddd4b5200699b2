"""Runs a program in memory of einfold's own: every intermediate value at its place in one arena.

A plan is made for the shapes of the inputs when they are first met, and all plans share the arena, so that a
prompt and the steps behind it, of one row or several, take the memory of the largest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.interpreter import Interpreter, Run
from ..ir.ops.record import in_place
from ..ir.program import Program
from .captured import Capture, Captured
from .expand import Instead, expanded
from .planning import MemoryPlan, plan_memory
from .settling import Settled, SettledRun
from .tiling import planned
from .writing import writers

CPU = torch.device("cpu")

#: The first call that stands for each of a program that was expanded.
Begins = Mapping[fx.Node, fx.Node]

#: Plans that are kept, by the shapes of the inputs.
KEPT = 8


def shapes_of(inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """What a plan is made for."""
    return tuple((name, each.shape, each.stride()) for name, each in inputs.items())


class InArena:
    """Runs a program whose intermediate values lie in an arena. Results are valid until the next run.

    Where something stands `instead` of calls, the program's calls stay whole: tiles are many launches of
    kernels, and save memory that weights are many times of.
    """

    def __init__(
        self,
        program: Program,
        device: torch.device = CPU,
        instead: Instead | None = None,
        kept: dict[str, Tensor] | None = None,
        moving: Collection[str] = (),
        capture: Capture | None = None,
    ) -> None:
        """Weights that are `kept` are read there; those that are `moving` lie elsewhere from run to run, and
        then nothing of a run can be captured."""
        self.program, self.device = program, device
        self._capture = None if moving else capture
        self._instead, self._moving = instead, moving
        self._weights: dict[str, Tensor] = {} if kept is None else kept
        # the device is not asked before it is needed
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._runs: dict[tuple[Any, ...], _Planned] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the arena: those of the largest plan so far."""
        return self._arena.nbytes

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gives the outputs by name, as `Interpreter.run`; caches are written in place."""
        return self._ready(inputs).run(inputs, self._arena)

    def begin(self, inputs: Mapping[str, Tensor]) -> Run:
        """The same as a run that may halt at any node of the program as it was given, where it is not cut
        into tiles."""
        return self._ready(inputs).begin(inputs, self._arena)

    def _ready(self, inputs: Mapping[str, Tensor]) -> _Planned:
        """The plan for inputs of these shapes, with an arena that is as large as it asks for."""
        key = shapes_of(inputs)
        run = self._runs.pop(key, None) or self._plan(inputs)
        self._runs[key] = run  # last: the plan that was used longest ago goes first
        if len(self._runs) > KEPT:
            del self._runs[next(iter(self._runs))]
        if run.plan.arena > self.nbytes:
            for each in self._runs.values():
                each.let_go()
            self._arena = self._arena.new_empty(0)  # the smaller one goes first
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # and torch would keep its memory
            self._arena = self._memory(run.plan.arena)
        return run

    def let_go(self) -> None:
        """Frees the arena and forgets all plans."""
        self._runs.clear()
        self._arena = self._arena.new_empty(0)

    def bytes_for(self, inputs: Mapping[str, Tensor]) -> int:
        """Bytes of the arena for inputs of these shapes; nothing is run or kept."""
        return self._plan(inputs).plan.arena

    def _plan(self, inputs: Mapping[str, Tensor]) -> _Planned:
        begins: Begins = {}
        if self._instead is None:
            program, plan = planned(self.program, inputs)
        else:
            program, begins = expanded(self.program, inputs, self._instead, self.device)
            plan = plan_memory(program, inputs)
        interpreter = Interpreter(program, device=self.device, kept=self._weights)
        return _Planned(plan, interpreter, begins, self._moving, self._capture)

    def _memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)


class _Planned:
    """A plan and what runs by it."""

    def __init__(
        self,
        plan: MemoryPlan,
        interpreter: Interpreter,
        begins: Begins,
        moving: Collection[str],
        capture: Capture | None,
    ) -> None:
        self.plan = plan
        self._interpreter, self._begins, self._moving = interpreter, begins, moving
        self._settled: Settled | None = None
        self._capture = capture
        self._captured: Captured | None = None

    def run(self, inputs: Mapping[str, Tensor], arena: Tensor) -> dict[str, Tensor]:
        """The outputs by name of a whole run, which is captured where it comes again and something can."""
        if self._capture is None:
            return self.begin(inputs, arena).results()
        if self._captured is None:
            self._captured = Captured(self._capture, self._interpreter.program)
        return self._captured.results(inputs, lambda: self.begin(inputs, arena))

    def begin(self, inputs: Mapping[str, Tensor], arena: Tensor) -> Run:
        """A run whose calls write into this arena, which stays the same until it is let go of."""
        if self._settled is None:
            here = writers(self._interpreter.program, self.plan, arena)
            self._interpreter.instead = in_place() | here
            self._settled = Settled(self._interpreter, self.plan, arena, self._moving)
        return SettledRun(self._settled, inputs, self._begins)

    def let_go(self) -> None:
        """Forgets the arena, so that its memory is free."""
        self._interpreter.instead, self._settled, self._captured = {}, None, None
