"""A program with its operators replaced by what they compute in torch, at given sizes.

Torch's own operators can write their results where they are told to, and so what happens within an operator
of einfold's can lie in the arena too: its meaning is run on the meta device, and its calls are written down.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...errors import pass_on
from ..ir.ops.record import operator_of
from ..ir.program import Program
from .recording import Recording, recorded
from .survey import META, survey

#: What a call that was left whole is run by, among the node's `meta`.
INSTEAD = "instead"

#: What stands for calls of a program, such as a function that launches kernels.
Instead = Mapping[fx.Node, Callable[..., Any]]


def expand(program: Program, inputs: Mapping[str, Tensor]) -> Program:
    """The same program for inputs of these shapes, in calls of torch's operators.

    Caches are written in place. A call whose meaning asks what its tensors hold, such as which experts were
    chosen, stays as it is.
    """
    return expanded(program, inputs, {}, META)[0]


def expanded(
    program: Program, inputs: Mapping[str, Tensor], instead: Instead, device: torch.device
) -> tuple[Program, dict[fx.Node, fx.Node]]:
    """What `expand` gives, and for each node of the program the first that stands for it or comes behind.

    For a call that something stands `instead` of, what that calls on this device is written down; launches of
    kernels are calls then too.
    """
    values = survey(program, inputs, stands=instead).values
    graph = fx.Graph()
    new: dict[fx.Node, Any] = {}
    ahead: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        ahead[node] = len(graph.nodes)
        meaning = _meaning(node, values, instead.get(node), device)
        if meaning is not None:
            new[node] = _write_down(graph, node, meaning, values, new)
        elif node.target is operator.getitem and isinstance(new[node.args[0]], tuple):
            new[node] = new[node.args[0]][node.args[1]]
        else:
            new[node] = graph.node_copy(node, lambda source: new[source])
            if node in instead:
                new[node].meta[INSTEAD] = instead[node]
    made = [*graph.nodes]
    return replace(program, graph=graph), {node: made[count] for node, count in ahead.items()}


def _meaning(
    node: fx.Node,
    values: Mapping[fx.Node, Any],
    stands: Callable[..., Any] | None,
    device: torch.device,
) -> Recording | None:
    """What a call computes; None where it is torch's own or asks what its tensors hold."""
    kind = operator_of(node.target)
    if kind is None:
        return None
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda source: values[source])
    try:
        with recorded(device) as meaning:
            meaning.given = (stands or kind.standing_in(kind.run))(*args, **kwargs)
    except Exception as error:
        pass_on(error)
        return None
    known = {id(values[source]) for source in node.all_input_nodes}
    for each in meaning.calls:
        asked = [a for a in pytree.tree_leaves((each.args, each.kwargs)) if isinstance(a, Tensor)]
        if not {id(a) for a in asked} <= known:
            return None  # a tensor of its own, which no call made
        known |= {id(a) for a in pytree.tree_leaves(each.given)}
    return meaning


def _write_down(
    graph: fx.Graph,
    node: fx.Node,
    meaning: Recording,
    values: Mapping[fx.Node, Any],
    new: Mapping[fx.Node, Any],
) -> Any:
    """Puts a meaning's calls into a graph; gives what stands for the call's results."""
    named = {id(values[source]): new[source] for source in node.all_input_nodes}

    def name(value: Any) -> Any:
        return named[id(value)] if isinstance(value, Tensor) else value

    for call in meaning.calls:
        if isinstance(call.given, bool | int | float):
            continue  # told by shapes: it stands among the arguments of what asked for it
        args, kwargs = pytree.tree_map(name, (call.args, call.kwargs))
        made = graph.call_function(call.target, args, kwargs)
        if isinstance(call.given, Tensor):
            named[id(call.given)] = made
        elif call.given is not None:
            for at, each in enumerate(call.given):
                named[id(each)] = graph.call_function(operator.getitem, (made, at))
    return pytree.tree_map(name, meaning.given)
