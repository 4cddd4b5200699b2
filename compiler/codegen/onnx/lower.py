"""Lowers a program to an ONNX model: one lowering function an operator, found in a table.

A lowering may be given for one flavour or for both; a program with an operator that has none is
lowered through torch's own exporter for that operator (`fallback.py`), or refused with its name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ....errors import UnsupportedError
from ...ir.program import Program, call_arguments, op_name
from ...ir.types import DTYPE_NAMES
from ...ir.weights_file import Placement
from .builder import CONTRIB, Builder, value_type

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


def lower(
    program: Program,
    weights_file: str,
    placements: dict[str, Placement],
    flavour: str = "ort",
    accuracy_level: int = 4,
) -> ir.Model:
    """The program as an ONNX model whose weights lie in `weights_file`, a name beside the model.

    `accuracy_level` is MatMulNBits's: 4 computes with int8 activations, 0 in float32.
    Raises UnsupportedError, naming operator and node, for what has no lowering.
    """
    from . import (  # noqa: F401  (fill the table)
        attention,
        creation,
        einfold_ops,
        elementwise,
        experts,
        fallback,
        quantized,
        sdpa,
        standard_ops,
    )

    builder = Builder(weights_file, placements)
    context = Context(program, flavour, builder, accuracy_level, opset=OPSET[flavour])
    inputs = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            kind, shape = value_type(node.meta["val"], _dims(program, node))
            context.values[node] = ir.Value(name=str(node.target), shape=shape, type=kind)
            inputs.append(context.values[node])
        elif node.op == "get_attr":
            # Packed weights are shown to their readers under other types; they read them by name.
            context.values[node] = (
                None if _packed(program, node) else builder.weight(str(node.target))
            )
        elif node.op == "call_function":
            context.values[node] = _lower_node(context, node, fallback.lower_by_torch)
    outputs = _outputs(context)
    builder.nodes = _live(builder.nodes, outputs)
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=builder.nodes,
        initializers=_used(builder),
        opset_imports={"": context.opset} | ({CONTRIB: 1} if _has_contrib(builder) else {}),
        name=program.model.architecture,
    )
    return ir.Model(graph, ir_version=10, producer_name="einfold", metadata_props=context.metadata)


def _lower_node(context: Context, node: fx.Node, fallback: Lowering) -> Any:
    if node.target is operator.getitem:
        source, index = node.args
        return context.values[source][index]  # type: ignore[index]
    if not isinstance(node.meta["val"], (torch.Tensor, tuple, list)):
        return None  # sizes are read where a shape needs them, see operands.shape_operand
    function = _TABLE.get((node.target, context.flavour), fallback)
    return function(context, node)


def _outputs(context: Context) -> list[ir.Value]:
    output = context.program.output
    values: list[ir.Value] = []
    for name, node in zip(output.meta["names"], output.args[0], strict=True):  # type: ignore[arg-type]
        value = context.value(node)
        taken = any(value is other for other in values)
        if value.producer() is None or taken or value.name != name:
            # An output has its own name; a cache output is the input's name with a prefix.
            wanted = (
                f"present.{name}"
                if any(name == str(p.target) for p in context.program.placeholders())
                else name
            )
            if value.producer() is None or taken:
                value = context.builder.op("Identity", value, name=wanted)
            else:
                value.name = wanted
        kind, shape = value_type(node.meta["val"], _dims(context.program, node))
        value.type, value.shape = kind, shape
        values.append(value)
    for name, value, node in context.rewritten:
        value.name = f"present.{name}"
        value.type, value.shape = value_type(node.meta["val"], _dims(context.program, node))[:2]
        values.append(value)
    return values


def _dims(program: Program, node: Any) -> list[str | int]:
    text = program.shapes.describe(node.meta["val"])
    inner = text[len(DTYPE_NAMES[node.meta["val"].dtype]) + 1 : -1]
    return [int(part) if part.isdigit() else part for part in inner.split(", ") if part]


def _packed(program: Program, node: fx.Node) -> bool:
    return program.weights[str(node.target)].dtype == torch.uint8


def _live(nodes: list[ir.Node], outputs: list[ir.Value]) -> list[ir.Node]:
    """The nodes that an output depends on: onnxruntime runs the others too, such as parts of a packed QKV."""
    needed = set(outputs)
    kept = []
    for node in reversed(nodes):
        if any(value in needed for value in node.outputs):
            kept.append(node)
            needed.update(_read((node,)))
    return kept[::-1]


def _used(builder: Builder) -> list[ir.Value]:
    read = {value.name for value in _read(builder.nodes)}
    return [value for name, value in builder.initializers.items() if name in read]


def _has_contrib(builder: Builder) -> bool:
    return any(node.domain == CONTRIB for node in _all(builder.nodes))


def _read(nodes: Iterable[ir.Node]) -> Iterator[ir.Value]:
    """The values that nodes read, in their branches too."""
    return (value for node in _all(nodes) for value in node.inputs if value is not None)


def _all(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """Nodes, and those of their branches."""
    for node in nodes:
        yield node
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _all(attribute.as_graph())


def unsupported(node: fx.Node, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{op_name(node.target)} at %{node.name} cannot be lowered to ONNX: {reason}"
    )
