"""Traces a function or module of tensors with `torch.export`, to be imported as a cascade."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ....errors import UnsupportedError, pass_on
from ...ir.interrupts import Later
from ..torch_says import quietly, reason_of
from .imported import Imported
from .importer import import_graph


def import_function(function: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> Imported:
    """The cascade of a function or module of tensors, traced by `torch.export` on example inputs.

    Raises UnsupportedError where it cannot be traced, or where an output is no cascade.
    """

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = function if isinstance(function, torch.nn.Module) else None

        def forward(self, *args: torch.Tensor) -> Any:
            return function(*args)

    try:
        with Later(), torch.no_grad(), quietly():
            exported: Any = torch.export.export(Wrapped(), tuple(inputs), strict=False)
            if _mutates(exported.graph):
                exported = exported.run_decompositions({})
    except Exception as error:
        pass_on(error)
        raise UnsupportedError(
            f"torch.export cannot trace the function: {reason_of(error)}"
        ) from error
    signature = exported.graph_signature
    known = dict(exported.constants)
    constants = {
        name: known[target]
        for name, target in signature.inputs_to_lifted_tensor_constants.items()
        if target in known
    }
    names = dict(zip(signature.user_inputs, _parameters(function, len(inputs)), strict=False))
    return import_graph(exported.graph, constants, names, signature.inputs_to_parameters)


def _parameters(function: Callable[..., Any], count: int) -> list[str]:
    """The names of a function's parameters, as far as they are simple."""
    called = function.forward if isinstance(function, torch.nn.Module) else function
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(called).parameters.values()
    return [parameter.name for parameter in found if parameter.kind in plain][:count]


def _mutates(graph: fx.Graph) -> bool:
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in graph.nodes
    )
