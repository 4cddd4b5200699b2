"""What a lowering is: a function of a context and a node, found in a table by operator and flavour.

A lowering may be given for one flavour or for both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from torch import fx

from ....errors import UnsupportedError
from ...ir.program import Program, call_arguments, op_name
from .builder import Builder

FLAVOURS = ("ort", "portable")

#: The standard operator set to begin with; an operator of a later one raises it (`Context.opset`).
OPSET = {"ort": 23, "portable": 24}

Lowering = Callable[["Context", fx.Node], "ir.Value | list[ir.Value]"]

_TABLE: dict[tuple[object, str], Lowering] = {}


def lowering(*targets: object, flavour: str | None = None) -> Callable[[Lowering], Lowering]:
    """Registers a lowering of operators, for one flavour or for both."""

    def register(function: Lowering) -> Lowering:
        for target in targets:
            for name in (flavour,) if flavour else FLAVOURS:
                _TABLE[target, name] = function
        return function

    return register


def lowering_of(target: object, flavour: str) -> Lowering | None:
    """The lowering of an operator for a flavour; None where it has none."""
    return _TABLE.get((target, flavour))


@dataclass
class Context:
    """What a lowering sees: the program, the builder, and the values made so far."""

    program: Program
    flavour: str
    builder: Builder
    accuracy_level: int = 4
    values: dict[fx.Node, Any] = field(default_factory=dict)
    opset: int = 23
    metadata: dict[str, str] = field(default_factory=dict)
    """What the model says of itself to the runtime."""
    exported: dict[Any, ir.Model] = field(default_factory=dict)
    """Calls that torch's exporter translated."""
    flat: dict[ir.Value, ir.Value] = field(default_factory=dict)
    """Values [B, S, H, D] that came as [B, S, H * D], with what they came as."""
    rewritten: list[tuple[str, ir.Value, fx.Node]] = field(default_factory=list)
    """Caches that an operator gives once more, unchanged: the cache's name and who gives it, the value, and
    the node whose type it has. Bound to the cache's buffer, nothing is copied."""

    def value(self, node: Any) -> ir.Value:
        """The ONNX value of a graph node."""
        found = self.values[node]
        assert isinstance(found, ir.Value)
        return found

    def optional(self, node: Any) -> ir.Value | None:
        return None if node is None else self.value(node)

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        return call_arguments(node)

    def shape(self, node: Any) -> list[int | None]:
        """Sizes of a node's tensor; None for a dynamic one."""
        return [size if isinstance(size, int) else None for size in node.meta["val"].shape]

    def weight_name(self, node: Any) -> str:
        """The name of the weight that an argument reads; UnsupportedError where it is computed."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            raise UnsupportedError(f"%{node} must be a weight to be lowered to ONNX")
        return str(node.target)


def unsupported(node: fx.Node, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{op_name(node.target)} at %{node.name} cannot be lowered to ONNX: {reason}"
    )
