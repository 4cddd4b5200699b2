"""The textual form of a program: one node a line, in the graph's order, so that dumps diff well.

    einfold.ir 1
    model architecture="llama" vocabulary=512 context=2048 hidden=256
    cache 0.0 heads=0,1 of=2 key=32 value=32 policy=full storage=f32
    weight @model.norm.weight : f32[256]
    input %input_ids "input_ids" : i64[B, S]
    read %w "model.norm.weight" : f32[256]
    call %x = einfold.rms_norm(%h, %w, 1e-06) : f32[B, S, 256]
    output "logits" = %x

`parser.parse` reads it back to the same graph.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import fx

from ...errors import IRError
from .program import Program, op_name
from .types import DTYPE_NAMES

FORMAT = "einfold.ir 1"


def print_program(program: Program) -> str:
    """The whole program as text, without the weights' data."""
    return "\n".join(_lines(program)) + "\n"


def _lines(program: Program) -> Iterator[str]:
    yield FORMAT
    yield "model " + " ".join(f"{k}={json.dumps(v)}" for k, v in asdict(program.model).items())
    if program.layout is not None:
        yield from program.layout.lines()
    for name in program.weights:
        weight = program.weights[name]
        sizes = ", ".join(map(str, weight.shape))
        yield f"weight @{name} : {DTYPE_NAMES[weight.dtype]}[{sizes}]"
    for node in program.graph.nodes:
        yield from print_node(program, node)


def print_node(program: Program, node: fx.Node) -> Iterator[str]:
    """The line of a node (one line a result for the output)."""
    if node.op == "output":
        for name, value in zip(node.meta["names"], node.args[0], strict=True):  # type: ignore[arg-type]
            yield f"output {json.dumps(name)} = %{value}"
        return
    kind = program.shapes.describe(node.meta["val"])
    if node.op == "placeholder":
        yield f"input %{node.name} {json.dumps(node.target)} : {kind}"
    elif node.op == "get_attr":
        yield f"read %{node.name} {json.dumps(node.target)} : {kind}"
    elif node.op == "call_function":
        items = [print_value(item) for item in node.args]
        items += [f"{key}={print_value(item)}" for key, item in node.kwargs.items()]
        yield f"call %{node.name} = {op_name(node.target)}({', '.join(items)}) : {kind}"
    else:
        raise IRError(f"node %{node.name} is a {node.op}, which the IR does not have")


def print_value(value: Any) -> str:
    """An argument: a node, a literal, a dtype, or a list of these."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(print_value(item) for item in value) + "]"
    raise IRError(f"an argument of type {type(value).__name__} has no textual form")
