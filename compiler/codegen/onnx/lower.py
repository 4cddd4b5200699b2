"""Lowers a program to an ONNX model, operator by operator.

An operator without a lowering of its own goes through torch's own exporter (`fallback.py`), or is refused
with its name.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ...ir.program import Program
from ...ir.types import DTYPE_NAMES
from ...ir.weights_file import Placement
from . import (  # noqa: F401  (these fill the table of lowerings)
    attention,
    creation,
    einfold_ops,
    elementwise,
    experts,
    k_quants,
    nbits,
    quantized,
    sdpa,
    softmax_attention,
    standard_ops,
)
from .builder import CONTRIB, Builder, value_type
from .fallback import lower_by_torch
from .lowerings import OPSET, Context, lowering_of


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
            context.values[node] = _lower_node(context, node)
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


def _lower_node(context: Context, node: fx.Node) -> Any:
    if node.target is operator.getitem:
        source, index = node.args
        return context.values[source][index]  # type: ignore[index]
    if not isinstance(node.meta["val"], (torch.Tensor, tuple, list)):
        return None  # sizes are read where a shape needs them, see operands.shape_operand
    function = lowering_of(node.target, context.flavour) or lower_by_torch
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
