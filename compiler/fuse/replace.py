"""Regions of an ATen graph, each as a cascade, folded, and lowered to what runs faster.

    graph -> regions -> cascade -> plan -> lowering -> graph

A region that cannot be imported, does not fold, or has no faster lowering stays in the graph as it was,
and its entry in the report says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import stop_on
from ..codegen.triton.device import without_kernels
from ..frontend.dynamo import trace_function
from ..ir.interrupts import Later
from .decide import Decision, decide, failure
from .regions import Region, find_regions, whole_region
from .report import AS_WRITTEN, FusedCascade, entry, source_of
from .subgraphs import Place, extract, place_of


def fuse(gm: fx.GraphModule, mode: FakeTensorMode, measure: str = "auto") -> list[FusedCascade]:
    """Replaces the regions of a graph in place; the report has one entry a region, in order."""
    entries: list[FusedCascade] = []
    kernels = _has_kernels(gm.graph)
    regions = find_regions(gm.graph, unreduced=kernels)
    if not regions and kernels and (whole := whole_region(gm.graph)) is not None:
        regions = [whole]
    for found in regions:
        # A region that reads another's result reads what stands in its place by now.
        region, decision = decide(gm.graph, found.again(), measure)
        entries.append(_replace(gm, region, decision, mode))
    gm.graph.lint()
    gm.recompile()
    return entries


def _has_kernels(graph: fx.Graph) -> bool:
    """Whether scores can stay out of memory, so that those that nothing reduces gain too."""
    values = (node.meta.get("val") for node in graph.nodes)
    kinds = {value.device.type for value in values if isinstance(value, Tensor) and value.ndim}
    return len(kinds) == 1 and not without_kernels(kinds.pop())


def _replace(
    gm: fx.GraphModule, region: Region, decision: Decision, mode: FakeTensorMode
) -> FusedCascade:
    if not decision.functions:
        source = "" if decision.lowering == AS_WRITTEN else _source(decision, extract(region))
        return _entry(region, decision, decision.lowering, decision.reason, source)
    place = place_of(region, list(gm.graph.nodes))
    if place.before is None:
        return _entry(region, decision, AS_WRITTEN, place.reason)
    why: list[str] = []
    for name, function in decision.functions:
        # Regions of one key have their inputs in one order; names are this graph's own.
        inputs = [region.inputs[at] for at in decision.reads]
        try:
            with Later():
                traced = trace_function(function, [node.meta["val"] for node in inputs], mode)
            wrong = differs(region, traced)
        except Exception as error:  # whatever it is, the region as written is right
            stop_on(error)
            wrong = failure(error)
        if wrong:
            why.append(f"{name}: {wrong}")
            continue
        for node, holder in zip(inputs, traced.graph.find_nodes(op="placeholder"), strict=True):
            holder._rename(node.name)
            holder.target = holder.name
        _insert(gm, region, place, inputs, traced)
        return _entry(region, decision, name, "", _source(decision, traced.graph))
    return _entry(region, decision, AS_WRITTEN, "; ".join(why))


def differs(region: Region, traced: fx.GraphModule) -> str:
    """Why the results cannot stand for the region's, or ""."""
    (output,) = traced.graph.find_nodes(op="output")
    for old, new in zip(region.outputs, output.args[0], strict=True):
        a, b = old.meta["val"], new.meta["val"]
        # A size in another form, such as 2*n*n//n, is compared by torch, which guards on the answer.
        same = str(list(a.shape)) == str(list(b.shape)) or list(a.shape) == list(b.shape)
        if a.dtype != b.dtype or not same:
            return (
                f"{old.name} would be {b.dtype}{list(b.shape)} in place of {a.dtype}{list(a.shape)}"
            )
    return ""


def _insert(
    gm: fx.GraphModule,
    region: Region,
    place: Place,
    inputs: Sequence[fx.Node],
    traced: fx.GraphModule,
) -> None:
    assert place.before is not None
    holders = traced.graph.find_nodes(op="placeholder")
    copies: dict[fx.Node, Any] = dict(zip(holders, inputs, strict=True))
    for node in traced.graph.find_nodes(op="get_attr"):
        name = f"_einfold_{len(list(gm.buffers())) + len(gm.graph.find_nodes(op='get_attr'))}"
        setattr(gm, name, getattr(traced, str(node.target)))
        node.target = name
    with gm.graph.inserting_before(place.before):
        results = gm.graph.graph_copy(traced.graph, copies)
    assert isinstance(results, (tuple, list))
    for old, new in zip(region.outputs, results, strict=True):
        assert isinstance(new, fx.Node)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in set(region.nodes))
    for node in reversed(region.nodes):
        gm.graph.erase_node(node)


def _entry(
    region: Region, decision: Decision, lowering: str, reason: str, source: str = ""
) -> FusedCascade:
    return entry(region.anchor, decision.folded, lowering, reason, source, decision.seconds)


def _source(decision: Decision, graph: fx.Graph) -> str:
    assert decision.folded is not None
    return source_of(decision.folded, graph)
