"""Operators without a lowering of their own go through torch's ONNX exporter, one at a time."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from ....errors import first_line, pass_on
from ...ir.interrupts import Later
from ...ir.program import op_name
from ...ir.types import hint_of
from .lowerings import OPSET, Context, unsupported


def lower_by_torch(
    context: Context,
    node: fx.Node,
    meaning: Callable[..., Any] | None = None,
    part: str = "",
) -> ir.Value | list[ir.Value]:
    """Exports a module of this one call and takes its nodes over; of `meaning`, where that says in torch what
    an operator of einfold computes, or a `part` of it.

    Raises UnsupportedError, naming the operator, where torch has no translation either.
    """
    if meaning is None and op_name(node.target).startswith("einfold."):
        raise unsupported(node, f"it has no lowering for the flavour {context.flavour!r}")
    sources = [source for source in node.all_input_nodes if isinstance(source.meta["val"], Tensor)]
    if len(sources) != len(node.all_input_nodes):
        raise unsupported(node, "it takes a size that is known only at run time")
    try:
        model = _exported(context, node, sources, meaning, part)
    except Exception as error:
        pass_on(error)
        raise unsupported(node, _reason(error)) from error
    return _take_over(context, node, model, [_whole(context, source) for source in sources])


def _whole(context: Context, source: fx.Node) -> ir.Value:
    """The value of a node; of packed weights, which their readers read by name, the bytes."""
    if context.values[source] is None:
        return context.builder.weight(context.weight_name(source))
    return context.value(source)


def _reason(error: BaseException) -> str:
    """What went wrong first: the exporter puts its own advice, in colours, over it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return re.sub(r"\x1b\[[0-9;]*m", "", first_line(error))


def _exported(
    context: Context,
    node: fx.Node,
    sources: list[fx.Node],
    meaning: Callable[..., Any] | None,
    part: str,
) -> ir.Model:
    """The exported call; an equal call on equal types is exported once."""
    describe = context.program.shapes.describe
    args = fx.map_arg((node.args, dict(node.kwargs)), lambda n: describe(n.meta["val"]))
    repeats = tuple(sources.index(source) for source in node.all_input_nodes)
    key = (str(node.target), part, str(args), repeats)
    if key not in context.exported:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            level = logging.root.manager.disable
            logging.disable(
                logging.ERROR
            )  # the exporter speaks of packages that nothing here needs
            try:
                with Later():
                    context.exported[key] = _export(context, node, sources, meaning)
            finally:
                logging.disable(level)
    return context.exported[key]


class _OneCall(torch.nn.Module):
    def __init__(
        self, node: fx.Node, sources: list[fx.Node], meaning: Callable[..., Any] | None
    ) -> None:
        super().__init__()
        self.node = node
        self.function: Any = meaning or node.target
        self.sources = sources

    def forward(self, *tensors: Tensor) -> Any:
        known = dict(zip(self.sources, tensors, strict=True))
        args, kwargs = fx.map_arg((self.node.args, dict(self.node.kwargs)), lambda n: known[n])
        return self.function(*args, **kwargs)


def _export(
    context: Context, node: fx.Node, sources: list[fx.Node], meaning: Callable[..., Any] | None
) -> ir.Model:
    examples, shapes = [], []
    for source in sources:
        value = source.meta["val"]
        sizes = [hint_of(size) for size in value.shape]
        examples.append(torch.ones(sizes, dtype=value.dtype))
        shapes.append(
            {
                axis: torch.export.Dim.DYNAMIC
                for axis, size in enumerate(value.shape)
                if not isinstance(size, int)
            }
        )
    program = torch.onnx.export(
        _OneCall(node, sources, meaning),
        tuple(examples),
        dynamo=True,
        # Not what the graph may have grown to: the exporter knows fewer, and operators mean the same since.
        opset_version=OPSET[context.flavour],
        dynamic_shapes=(tuple(shapes),),
        verbose=False,
        optimize=True,
    )
    assert program is not None
    model: ir.Model = program.model
    return model


def _take_over(
    context: Context, node: fx.Node, model: ir.Model, inputs: list[ir.Value]
) -> ir.Value | list[ir.Value]:
    """Copies the exported nodes into the builder, with new names."""
    graph, builder = model.graph, context.builder
    if any(function.domain for function in model.functions.values()):
        raise unsupported(node, "torch's translation uses functions")
    if any(a.type == ir.AttributeType.GRAPH for old in graph for a in old.attributes.values()):
        raise unsupported(node, "torch's translation branches or loops")
    mapped: dict[ir.Value | None, ir.Value | None] = {None: None}
    mapped |= dict(zip(graph.inputs, inputs, strict=True))
    for value in graph.initializers.values():
        assert value.const_value is not None
        array = value.const_value.numpy()
        mapped[value] = builder.constant(array, array.dtype)
    for old in graph:
        attributes = {key: attribute.value for key, attribute in old.attributes.items()}
        new = builder.multi(
            old.op_type,
            len(old.outputs),
            *(mapped[value] for value in old.inputs),
            domain=old.domain,
            **attributes,
        )
        mapped |= dict(zip(old.outputs, new, strict=True))
    results = [mapped[value] for value in graph.outputs]
    assert all(isinstance(value, ir.Value) for value in results)
    found: list[ir.Value] = [value for value in results if value is not None]
    return found if isinstance(node.meta["val"], (tuple, list)) else found[0]
