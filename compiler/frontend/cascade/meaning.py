"""The meaning of an operator of the IR as a cascade: its own code in torch, traced and imported.

So what a kernel computes is written once, in the operator, and fused as what a user writes is. A row that
sees no key is zeros there by `_safe_softmax`, which the importer knows: it looks for a maximum of -inf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...ir.interrupts import Later
from ..dynamo import trace_function
from .imported import Imported
from .importer import import_graph


def import_meaning(
    meaning: Callable[..., tuple[torch.Tensor, ...]],
    values: Mapping[str, Any],
    mode: FakeTensorMode,
) -> Imported:
    """The cascade of a pure function of keyword arguments, whose inputs are called as these are.

    `values` are fake tensors of `mode`, and what else there is, which is built in. Raises UnsupportedError
    where what the function gives is no cascade.
    """
    given = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def of_tensors(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return meaning(**{**values, **dict(zip(given, tensors, strict=True))})

    with Later():
        traced = trace_function(of_tensors, list(given.values()), mode)
    for name, holder in zip(given, traced.graph.find_nodes(op="placeholder"), strict=True):
        holder._rename(name)
    return import_graph(traced.graph, names={name: name for name in given})


__all__ = ["import_meaning"]
