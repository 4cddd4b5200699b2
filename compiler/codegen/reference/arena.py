"""Runs a program in memory of einfold's own: every intermediate value at its place in one arena.

A plan is made for the shapes of the inputs when they are first met, and all plans share the arena, so that a
prompt and the steps behind it, of one row or several, take the memory of the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.interpreter import Interpreter
from ...ir.ops.record import in_place, operator_of
from ...ir.program import Program
from ...memory.expand import expand
from ...memory.planning import MemoryPlan, plan_memory
from ...memory.survey import number, tensors

aten = torch.ops.aten

#: What stands for each call, and writes its results where the plan has them.
Writers = dict[Any, Callable[..., Any]]

#: Plans that are kept, by the shapes of the inputs.
KEPT = 8


class InArena:
    """Runs a program whose intermediate values lie in an arena. Results are valid until the next run."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._weights: dict[str, Tensor] = {}
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._runs: dict[tuple[Any, ...], _Run] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the arena: those of the largest plan so far."""
        return self._arena.nbytes

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gives the outputs by name, as `Interpreter.run`; caches are written in place."""
        key = tuple((name, each.shape, each.stride()) for name, each in inputs.items())
        run = self._runs.pop(key, None) or self._plan(inputs)
        self._runs[key] = run  # last: the plan that was used longest ago goes first
        if len(self._runs) > KEPT:
            del self._runs[next(iter(self._runs))]
        if run.plan.arena > self.nbytes:
            for each in self._runs.values():
                each.let_go()
            self._arena = torch.empty(0, dtype=torch.uint8)  # the smaller one goes first
            self._arena = torch.empty(run.plan.arena, dtype=torch.uint8)
        return run.within(self._arena).run(inputs)

    def _plan(self, inputs: Mapping[str, Tensor]) -> _Run:
        program = expand(self.program, inputs)
        cpu = torch.device("cpu")
        interpreter = Interpreter(program, device=cpu, kept=self._weights)
        return _Run(plan_memory(program, inputs), interpreter)


class _Run:
    """A plan and what runs by it."""

    def __init__(self, plan: MemoryPlan, interpreter: Interpreter) -> None:
        self.plan = plan
        self._interpreter = interpreter
        self._arena: Tensor | None = None

    def within(self, arena: Tensor) -> Interpreter:
        """The interpreter, whose calls write into this arena."""
        if self._arena is not arena:
            self._arena = arena
            here = writers(self._interpreter.program, self.plan, arena)
            self._interpreter.instead = in_place() | here
        return self._interpreter

    def let_go(self) -> None:
        """Forgets the arena, so that its memory is free."""
        self._interpreter.instead, self._arena = {}, None


def writers(program: Program, plan: MemoryPlan, arena: Tensor) -> Writers:
    """What stands for the calls that allocate, over an arena of the plan's size or more."""
    found: Writers = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            written = [
                each
                for at, each in enumerate(plan.survey.results(node))
                if (node, at) in plan.sharing.in_place or _allocates(node, each, plan)
            ]
            if written:
                out = tuple(_placed(each, plan, arena) for each in written)
                found[node] = _writer(node.target, out)
    return found


def _allocates(node: fx.Node, result: Tensor, plan: MemoryPlan) -> bool:
    made = plan.survey.of(result)
    return made is not None and made.node is node


def _placed(tensor: Tensor, plan: MemoryPlan, arena: Tensor) -> Tensor:
    """The part of the arena that holds a value."""
    first = plan.offsets[number(tensor)] // tensor.dtype.itemsize + tensor.storage_offset()
    return arena.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), first)


def _copy(out: Tensor, source: Tensor, *_: Any, **__: Any) -> None:
    if out.data_ptr() != source.data_ptr():  # in place there is nothing to do
        out.view(source.shape).copy_(source)


def _masked_fill(out: Tensor, source: Tensor, mask: Tensor, value: float) -> None:
    _copy(out, source)
    out.masked_fill_(mask, value)


#: Operators whose own forms with `out` allocate, as they are written into a tensor.
INTO: dict[Any, Callable[..., Any]] = {
    aten.clone.default: _copy,
    aten._to_copy.default: _copy,
    aten.reshape.default: _copy,
    aten.masked_fill.Scalar: _masked_fill,
    aten.zeros_like.default: lambda out, *_, **__: out.zero_(),
}


def _writer(target: Any, out: tuple[Tensor, ...]) -> Callable[..., Any]:
    if target in INTO:
        return _given(INTO[target], out[0])
    kind = operator_of(target)
    if kind is not None:  # it asked what its tensors hold; caches are not among what it allocates
        return kind.standing_in(lambda call: _moved(call.run(), out))
    variant = out_variant(target) if isinstance(target, torch._ops.OpOverload) else None
    if variant is None or len(variant[1]) != len(out):
        return _copied(target, out)
    call, names = variant
    allowed = {argument.name for argument in call._schema.arguments}
    given = dict(zip(names, out, strict=True))

    def write(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **{k: v for k, v in kwargs.items() if k in allowed}, **given)

    return write


def _given(into: Callable[..., Any], out: Tensor) -> Callable[..., Tensor]:
    def write(*args: Any, **kwargs: Any) -> Tensor:
        into(out, *args, **kwargs)
        return out

    return write


def _copied(target: Callable[..., Any], out: tuple[Tensor, ...]) -> Callable[..., Any]:
    """For an operator that allocates its results itself: they are moved to where they are to lie."""
    return lambda *args, **kwargs: _moved(target(*args, **kwargs), out)


def _moved(given: Any, out: tuple[Tensor, ...]) -> Any:
    for place, value in zip(out, tensors(given), strict=True):
        place.copy_(value)
    return out[0] if isinstance(given, Tensor) else out


def out_variant(target: torch._ops.OpOverload) -> tuple[torch._ops.OpOverload, list[str]] | None:
    """The overload of an operator that writes into given tensors, and their names; None without one."""
    packet, asked = target.overloadpacket, _positional(target)
    for name in packet.overloads():
        overload = getattr(packet, name)
        names = [argument.name for argument in overload._schema.arguments if argument.is_out]
        if names and _positional(overload) == asked:
            return overload, names
    return None


def _positional(overload: torch._ops.OpOverload) -> list[tuple[str, str]]:
    return [
        (argument.name, str(argument.type))
        for argument in overload._schema.arguments
        if not argument.kwarg_only
    ]
