"""Runs a program by the reference meaning of its operators, on any device that torch has.

A graph may name all of its weights before the first call, as traces do. So a weight is no value of a run:
it is loaded by each call that reads it, and only an interpreter that keeps its weights holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import IRError
from .forks import settle_torch
from .heap import give_back
from .program import Program

#: Bytes of weights that are let go of, behind which the C library gives back what it kept of them: they leave
#: holes between activations.
_HOLES = 128 << 20


class Interpreter:
    """Executes a program node by node; intermediate values go as soon as nothing reads them.

    `instead` names operators, or single nodes, that another function stands in for, such as one that
    writes in place. Tensors that an operator makes from nothing are made on `device`. Interpreters may share
    the weights that they have `kept`. With `gradients` torch follows what is computed, so that results can be
    derived by what stands `instead`; what torch cannot see through must be among these.
    """

    def __init__(
        self,
        program: Program,
        keep_weights: bool = True,
        instead: Mapping[Any, Callable[..., Any]] | None = None,
        device: torch.device | None = None,
        kept: dict[str, Tensor] | None = None,
        gradients: bool = False,
    ) -> None:
        self.program = program
        self.gradients = gradients
        self._device = device
        self.instead = dict(instead or {})
        if kept is None:
            kept = {}
        self._kept: dict[str, Tensor] | None = kept if keep_weights else None
        self._holes = 0
        self.dead_after = _last_uses(program.graph)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gives the outputs by name. `inputs` are by the names of the program's inputs."""
        return Run(self, inputs).results()

    def evaluate(
        self, node: fx.Node, values: dict[fx.Node, Any], inputs: Mapping[str, Tensor]
    ) -> Any:
        """What a node gives, from the values of those that it reads."""
        if node.op == "placeholder":
            if node.target not in inputs:
                raise IRError(f"input {node.target!r} was not given")
            return inputs[str(node.target)]
        if node.op == "get_attr":
            return self.weight(str(node.target))
        function, args, kwargs = self.called(node, values)
        return function(*args, **kwargs)

    def called(
        self, node: fx.Node, values: Mapping[fx.Node, Any]
    ) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """What a call's node calls, and with what, from the values of those that it reads."""
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
        function: Any = self.instead.get(node) or self.instead.get(node.target, node.target)
        if self._device is not None and _names_device(function):
            kwargs = {**kwargs, "device": self._device}
        return function, args, kwargs

    def weight(self, name: str) -> Tensor:
        """A weight as the program reads it."""
        if self._kept is None:
            if self._holes >= _HOLES:
                give_back()
                self._holes = 0
            weight = self.program.weights[name].load()
            self._holes += weight.nbytes
            return weight
        if name not in self._kept:
            self._kept[name] = self.program.weights[name].load()
        return self._kept[name]


class _Values(dict[fx.Node, Any]):
    """What nodes gave, and weights as they are read."""

    def __init__(self, interpreter: Interpreter, inputs: Mapping[str, Tensor]) -> None:
        self._interpreter, self._inputs = interpreter, inputs

    def __missing__(self, node: fx.Node) -> Any:
        if node.op != "get_attr":
            raise KeyError(node)
        return self._interpreter.evaluate(node, self, self._inputs)


class Run:
    """One run of a program, as far as it has come: `values` are those that are still needed.

    It can go on where an earlier one stood `at` a node, given that one's values by the names of their nodes.
    """

    def __init__(
        self,
        interpreter: Interpreter,
        inputs: Mapping[str, Tensor],
        at: fx.Node | None = None,
        known: Mapping[str, Any] | None = None,
    ) -> None:
        self._interpreter, self._inputs = interpreter, inputs
        self.values = _Values(interpreter, inputs)
        self._nodes = [*interpreter.program.graph.nodes]
        self._next = 0
        if at is not None:
            self._next = self._nodes.index(at)
            known, before = known or {}, self._nodes[: self._next]
            self.values |= {node: known[node.name] for node in before if node.name in known}

    def until(self, stop: fx.Node) -> None:
        """Goes on to a node, which is the next to be run."""
        settle_torch()
        interpreter, values = self._interpreter, self.values
        with torch.set_grad_enabled(interpreter.gradients):
            while (node := self._nodes[self._next]) is not stop:
                if node.op != "get_attr":
                    values[node] = self._evaluate(node)
                    for dead in interpreter.dead_after.get(node, ()):
                        del values[dead]
                self._next += 1

    def _evaluate(self, node: fx.Node) -> Any:
        return self._interpreter.evaluate(node, self.values, self._inputs)

    @property
    def known(self) -> dict[str, Any]:
        """What another run needs to go on from here: values by the names of their nodes, weights apart."""
        return {node.name: value for node, value in self.values.items()}

    def arguments(self, node: fx.Node) -> tuple[Any, ...]:
        """What a node is given that is the next to be run."""
        found: tuple[Any, ...] = fx.map_arg(node.args, lambda read: self.values[read])
        return found

    def results(self) -> dict[str, Tensor]:
        """The outputs by name."""
        output = self._interpreter.program.output
        self.until(output)
        names = output.meta["names"]
        return dict(zip(names, self.arguments(output)[0], strict=True))


def _names_device(function: object) -> bool:
    """Whether an operator can be told where to make its result; the IR itself has no devices."""
    return isinstance(function, torch._ops.OpOverload) and any(
        argument.name == "device" for argument in function._schema.arguments
    )


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op in ("output", "get_attr"):
            continue
        last[node] = node
        for source in node.all_input_nodes:
            if source.op != "get_attr":
                last[source] = node
    for source in graph.find_nodes(op="output")[0].all_input_nodes:
        last.pop(source, None)
    dead: dict[fx.Node, list[fx.Node]] = {}
    for source, user in last.items():
        dead.setdefault(user, []).append(source)
    return dead


def evaluate_cone(
    roots: list[fx.Node], known: Mapping[fx.Node, Any], program: Program
) -> list[Any]:
    """The values of `roots` from the values of some nodes that they depend on, and weights."""
    values: dict[fx.Node, Any] = dict(known)
    with torch.no_grad():
        return [_value_of(root, values, program) for root in roots]


def _value_of(node: fx.Node, values: dict[fx.Node, Any], program: Program) -> Any:
    if node not in values:
        if node.op == "get_attr":
            values[node] = program.weights[str(node.target)].load()
        elif node.op == "call_function":
            for source in node.all_input_nodes:
                _value_of(source, values, program)
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            raise IRError(f"%{node.name} is an input whose value is not known")
    return values[node]
