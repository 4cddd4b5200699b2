"""A program with its operators replaced by what they compute in torch, at given sizes.

Torch's own operators can write their results where they are told to, and so what happens within an operator
of einfold's can lie in the arena too: its meaning is run on the meta device, and its calls are written down.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import pass_on
from ..ir.ops.record import operator_of
from ..ir.program import Program, call_arguments
from .survey import survey

aten = torch.ops.aten

#: Calls that only hold for the strides that a value had here: written in place, it may have others.
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default}

#: Calls that allocate within, and what torch says they are made of.
_MADE_OF = get_decompositions([aten._safe_softmax, aten.embedding])


def expand(program: Program, inputs: Mapping[str, Tensor]) -> Program:
    """The same program for inputs of these shapes, in calls of torch's operators.

    Caches are written in place. A call whose meaning asks what its tensors hold, such as which experts were
    chosen, stays as it is.
    """
    values = survey(program, inputs).values
    graph = fx.Graph()
    new: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        meaning = _meaning(node, values)
        if meaning is not None:
            new[node] = _write_down(graph, node, meaning, values, new)
        elif node.target is operator.getitem and isinstance(new[node.args[0]], tuple):
            new[node] = new[node.args[0]][node.args[1]]
        else:
            new[node] = graph.node_copy(node, lambda source: new[source])
    return replace(program, graph=graph)


@dataclass
class _Call:
    target: Any
    args: Any
    kwargs: Any
    given: Any


class _Meaning(TorchDispatchMode):
    """The calls that are made of torch, and what comes of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self.given: Any = None

    def __torch_dispatch__(
        self, target: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if target in _MADE_OF:
            with self:
                return _MADE_OF[target](*args, **kwargs)
        if target in _VIEWS:
            target, args = aten.reshape.default, args[:2]
        given = target(*args, **kwargs)
        self.calls.append(_Call(target, args, kwargs, given))
        return given


def _meaning(node: fx.Node, values: Mapping[fx.Node, Any]) -> _Meaning | None:
    """What a call computes; None where it is torch's own or asks what its tensors hold."""
    kind = operator_of(node.target)
    if kind is None:
        return None
    call = kind(**fx.map_arg(call_arguments(node), lambda source: values[source]))
    meaning = _Meaning()
    try:
        with torch.no_grad(), meaning:
            meaning.given = call.run()
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
    meaning: _Meaning,
    values: Mapping[fx.Node, Any],
    new: Mapping[fx.Node, Any],
) -> Any:
    """Puts a meaning's calls into a graph; gives what stands for the call's results."""
    named = {id(values[source]): new[source] for source in node.all_input_nodes}

    def name(value: Any) -> Any:
        return named[id(value)] if isinstance(value, Tensor) else value

    for call in meaning.calls:
        args, kwargs = pytree.tree_map(name, (call.args, call.kwargs))
        made = graph.call_function(call.target, args, kwargs)
        if isinstance(call.given, Tensor):
            named[id(call.given)] = made
        else:
            for at, each in enumerate(call.given):
                named[id(each)] = graph.call_function(operator.getitem, (made, at))
    kind = operator_of(node.target)
    assert kind is not None
    given = pytree.tree_map(name, meaning.given)
    if not kind.writes:
        return given
    arguments = call_arguments(node)
    return (given, *(new[arguments[each]] for each in kind.writes))
