"""Calls of a planned program that are the same in every run: looked up once, and called from then on.

Values lie in the arena where a plan has them, so a call reads the same tensors in every run and writes to the
same place. What differs is what is given anew: inputs, caches among them, weights that come and go, and what
an operator allocates itself. A call that reads none of it needs nothing looked up any more, and one that only
looks at such values is not called again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..ir.forks import settle_torch
from ..ir.interpreter import Interpreter, Run
from .expand import INSTEAD
from .planning import MemoryPlan
from .survey import number


class _Step(NamedTuple):
    """What is to be done at a node: a call that settled, or without one the node is evaluated."""

    node: fx.Node
    call: Callable[[], Any] | None
    keeps: bool
    """Whether what it gives is needed, and differs from run to run."""
    dead: tuple[fx.Node, ...]
    """Values that nothing reads any more."""


class Settled:
    """What the first run of a program found, whose calls write into an arena, for those behind it."""

    def __init__(
        self, interpreter: Interpreter, plan: MemoryPlan, arena: Tensor, moving: Collection[str]
    ) -> None:
        """`moving` are weights that may lie elsewhere in the next run."""
        self.interpreter = interpreter
        self.values: dict[fx.Node, Any] = {}
        self.steps: list[_Step] = []
        self.place: dict[fx.Node, int] = {}
        """For each node the first step that is at it or behind it, once all steps are known."""
        self._survey, self._moving = plan.survey, moving
        self._stays = {number(arena)}
        self._calls: dict[fx.Node, Callable[[], Any] | None] = {}

    def see(self, node: fx.Node, given: Mapping[fx.Node, Any], value: Any) -> None:
        """A call of the first run, with values that it is given among others, and what it gives."""
        for read in node.all_input_nodes:
            if read.op == "get_attr" and read.target not in self._moving:
                self.values[read] = given[read]
                self._stays.add(number(given[read]))
        known = all(read in self.values for read in node.all_input_nodes)
        looks = self._looks(node)
        # One of several results, of which others do not stay
        picks = node.target is operator.getitem and self._writes(node.all_input_nodes[0])
        # What is neither is a view by numbers, such as the weight of the expert that was chosen
        found = known or picks if looks else self._writes(node)
        stays = found and self._stay(value)
        if stays:
            self.values[node] = value
        if looks and stays:
            self._calls[node] = None
        elif known:
            self._calls[node] = self._bound(node)

    def end(self) -> None:
        """All calls were seen."""
        for node in self.interpreter.program.graph.nodes:
            self.place[node] = len(self.steps)
            if node.op in ("get_attr", "output"):
                continue
            call = self._calls.get(node)
            if call is None and node in self._calls:
                continue
            dead = self.interpreter.dead_after.get(node, ())
            left = tuple(each for each in dead if each not in self.values)
            self.steps.append(_Step(node, call, node not in self.values, left))

    def _stood(self, node: fx.Node) -> bool:
        """Whether something stands for a call."""
        instead = self.interpreter.instead
        return node in instead or node.target in instead or INSTEAD in node.meta

    def _looks(self, node: fx.Node) -> bool:
        """Whether a call only looks at what it is given, and nothing else stands for it."""
        return not self._stood(node) and self._survey.looks(node)

    def _writes(self, node: fx.Node) -> bool:
        """Whether a call writes what it gives, where the plan or one of its arguments has it."""
        schema = getattr(node.target, "_schema", None)
        return self._stood(node) or (schema is not None and schema.is_mutable)

    def _stay(self, value: Any) -> bool:
        """Whether what a call gave lies where it will in every run."""
        leaves = pytree.tree_leaves(value)
        return all(isinstance(each, Tensor) and number(each) in self._stays for each in leaves)

    def _bound(self, node: fx.Node) -> Callable[[], Any]:
        """A call with the tensors that it is given in every run."""
        function, args, kwargs = self.interpreter.called(node, self.values)
        return partial(function, *args, **kwargs)


class SettledRun(Run):
    """A run in an arena. The first one settles what it can, those behind it do what is left.

    It is told where to halt by nodes of the program that was expanded, of which each `begins` at another.
    """

    def __init__(
        self, settled: Settled, inputs: Mapping[str, Tensor], begins: Mapping[fx.Node, fx.Node]
    ) -> None:
        super().__init__(settled.interpreter, inputs)
        self._settled, self._begins = settled, begins
        self._first = not settled.place
        self.values.update(settled.values)

    def until(self, stop: fx.Node) -> None:
        stop = self._begins.get(stop, stop)
        if not self._first:
            settle_torch()
            with torch.no_grad():
                self._do(self._settled.place[stop])
            return
        super().until(stop)
        if stop.op == "output" and not self._settled.place:  # it may be halted at more than once
            self._settled.end()

    def _evaluate(self, node: fx.Node) -> Any:
        value = super()._evaluate(node)
        if self._first and node.op == "call_function":
            self._settled.see(node, self.values, value)
        return value

    def _do(self, end: int) -> None:
        values = self.values
        for node, call, keeps, dead in self._settled.steps[self._next : end]:
            value = self._evaluate(node) if call is None else call()
            if keeps:
                values[node] = value
            for each in dead:
                del values[each]
        self._next = end
