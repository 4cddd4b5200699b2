"""From Dynamo's graphs to the ATen level, before dispatch, at which everything else works.

self.q_proj(x)                     aten.linear(x, weight)
F.scaled_dot_product_attention ->  aten.scaled_dot_product_attention, still whole
cache.index_copy_(...)             aten.index_copy_, still in place
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._functorch.compile_utils import fx_graph_cse
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from .inplace import out_of_place

aten = torch.ops.aten

#: Casts that may turn out to change nothing. Their result is then the input itself.
_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default}
_SHAPES = {aten.reshape.default, aten.expand.default}
_NOTHING = {aten._assert_tensor_metadata.default, aten.promote_types.default}


def example_values(gm: fx.GraphModule) -> list[Any]:
    """The fake tensors and symbolic sizes that Dynamo gave the graph's inputs."""
    return [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]


def fake_mode_of(values: list[Any]) -> FakeTensorMode | None:
    """The fake mode that the tensors belong to; None where there is no tensor."""
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


def to_aten(gm: fx.GraphModule, values: list[Any], mode: FakeTensorMode) -> fx.GraphModule:
    """The same graph in ATen operators before dispatch, on the same symbols, without casts that do nothing.

    Inputs stay as they are and in their order. In-place operators stay in place and in order, but for those
    on what the graph alone holds (`inplace.py`).
    """
    # Without a tracing context of its own, make_fx takes Dynamo's, whose fake mode is another one.
    with mode, tracing(None), preserve_node_meta(), _real_tensors(mode):
        traced: fx.GraphModule = make_fx(
            fx.Interpreter(gm).run,
            pre_dispatch=True,
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )(*values)
    given = gm.graph.find_nodes(op="placeholder")
    for old, new in zip(given, traced.graph.find_nodes(op="placeholder"), strict=True):
        # L_q_ is what Dynamo makes of a local q.
        name = re.sub(r"^L_(.+?)_?$", r"\1", old.name, flags=re.IGNORECASE)
        new._rename(re.sub(r"(^|_)(modules|parameters|buffers)_", r"\1", name))
        new.target = new.name
    normalise(traced)
    out_of_place(traced.graph)
    traced.recompile()
    return traced


@contextmanager
def _real_tensors(mode: FakeTensorMode) -> Iterator[None]:
    """Lets a graph hold tensors that are no fakes: parameters that the caller has frozen."""
    before = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    try:
        yield
    finally:
        mode.allow_non_fake_inputs = before


def trace_function(
    function: Callable[..., Any], values: Sequence[Any], mode: FakeTensorMode
) -> fx.GraphModule:
    """A pure function of tensors as a graph in the same form, each value computed once."""
    with mode, tracing(None):
        # A tensor that is given twice would be traced as the last argument that it is.
        apart = [v.detach() if isinstance(v, torch.Tensor) else v for v in values]
        traced: fx.GraphModule = make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True)(
            *apart
        )
    drop_idle(traced.graph)
    graph = fx_graph_cse(traced.graph)
    graph.eliminate_dead_code()
    return fx.GraphModule(traced, graph)


def drop_idle(graph: fx.Graph) -> None:
    """Drops what gives its argument back: casts, reshapes and expansions to what is there."""
    for node in list(graph.nodes):
        if node.target in _CASTS | _SHAPES and _is_idle(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in _NOTHING:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def normalise(gm: fx.GraphModule) -> None:
    """Drops casts that change nothing, and lets views be of any memory order.

    x.to(float32) of a float32 tensor is x itself: an alias that would hide what follows from what. A
    view wants the strides that it was traced with, which what replaces its source need not have.
    """
    for node in list(gm.graph.nodes):
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        if node.target in _CASTS and _is_idle(node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        elif node.target in _NOTHING:
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code(is_impure_node=is_impure)
    gm.recompile()


def _is_idle(node: fx.Node) -> bool:
    before, after = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if node.kwargs.get("copy") or any(arg is True for arg in node.args[2:]):
        return False
    same = before.dtype == after.dtype and before.device == after.device
    # Compared as text: asking symbols whether they are equal would add a guard.
    return same and _layout(before) == _layout(after)


def _layout(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {list(tensor.stride())}"


def is_impure(node: fx.Node) -> bool:
    """Whether a node does something beside computing its value.

    torch's own test takes in-place operators for pure and would drop the counter of a static cache.
    """
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function":
        return node.is_impure()
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable) or node.is_impure()
    return node.target is not operator.getitem and node.is_impure()
