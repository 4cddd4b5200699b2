"""How many bytes of intermediate values are live at once while a program runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ..ir.program import Program, writes_cache

#: Calls whose result shares the memory of their input.
_VIEWS = {
    torch.ops.aten.reshape.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.dim,
}

#: Bytes that a call takes beside its inputs and results.
Scratch = Callable[[Program, fx.Node, Mapping[str, int]], int]


def _none(program: Program, node: fx.Node, dims: Mapping[str, int]) -> int:
    return 0


def peak_activation_bytes(
    program: Program, dims: Mapping[str, int], scratch: Scratch = _none
) -> int:
    """The largest sum of live intermediate values, with dims such as B, S, C, N given as numbers.

    Inputs, caches and weights are not counted; operators run in the graph's order. `scratch` says what a
    call takes while it runs, as a target has it.
    """
    sizes = {node: _bytes(program, node, dims) for node in program.graph.nodes}
    last = _last_use(program)
    live, peak = 0, 0
    for index, node in enumerate(program.graph.nodes):
        live += sizes[node]
        peak = max(peak, live + scratch(program, node, dims))
        for dead in last.get(index, ()):
            live -= sizes[dead]
    return peak


def _last_use(program: Program) -> dict[int, list[fx.Node]]:
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    ends: dict[int, list[fx.Node]] = {}
    for node in program.graph.nodes:
        # A view keeps what it looks at alive, so its own uses count for its source.
        users = set(node.users)
        frontier = [user for user in users if user.target in _VIEWS]
        while frontier:
            view = frontier.pop()
            frontier += [user for user in view.users if user.target in _VIEWS and user not in users]
            users |= set(view.users)
        ends.setdefault(max((order[user] for user in users), default=order[node]), []).append(node)
    return ends


def _bytes(program: Program, node: fx.Node, dims: Mapping[str, int]) -> int:
    if (
        node.op != "call_function"
        or node.target in _VIEWS
        or not isinstance(node.target, torch._ops.OpOverload)
    ):
        return 0
    value = node.meta["val"]
    if writes_cache(node):
        value = value[0]  # the caches are updated in place
    return _value_bytes(program, value, dims)


def _value_bytes(program: Program, value: Any, dims: Mapping[str, int]) -> int:
    if isinstance(value, (tuple, list)):
        return sum(_value_bytes(program, item, dims) for item in value)
    if not isinstance(value, torch.Tensor):
        return 0
    total = value.dtype.itemsize
    for size in value.shape:
        total *= program.shapes.evaluate(size, dims)
    return total
