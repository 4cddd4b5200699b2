"""Regions of a program, each as a cascade, folded, and lowered as a target says.

    program -> regions -> cascade -> plan -> lowering -> program

As in `replace`, which does this for graphs of Dynamo's, a region that cannot be imported, does not fold or
has no lowering stays as it was, and its entry in the report says why. A lowering is run beside its region on
random tensors, but nothing is timed: the program runs elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ...errors import IRError, UnsupportedError, stop_on
from ..frontend.dynamo import trace_function
from ..frontend.normalise import normalise_call
from ..ir.cascade.cascade import Cascade
from ..ir.cascade.expr import Apply, walk
from ..ir.interrupts import Later
from ..ir.program import Editor, Program
from .decide import failure
from .folded import Folded, Function, Maker, folded, import_region, reads_of, signature_of
from .regions import Region, find_regions
from .replace import differs
from .report import AS_WRITTEN, FusedCascade, entry, source_of
from .subgraphs import extract, place_of
from .trial import Trial, agrees, hints_of

#: The largest mask that is looked at, in bytes.
_LARGEST = 2**26

NO_EXPONENTIALS = "nothing is weighted by exponentials"


def fuse_program(program: Program, lowering: str, make: Maker) -> list[FusedCascade]:
    """Replaces the attention of a program in place; the report has one entry a region, in order.

    `make` makes the lowering, which the report calls `lowering`.
    """
    entries: list[FusedCascade] = []
    for found in find_regions(program.graph):
        # A region that reads another's result reads what stands in its place by now.
        entries.append(_fuse(program, found.again(), lowering, make))
    return entries


def _fuse(program: Program, region: Region, lowering: str, make: Maker) -> FusedCascade:
    anchor = region.anchor
    try:
        region, imported = import_region(program.graph, region)
    except UnsupportedError as error:
        return entry(anchor, None, AS_WRITTEN, f"not a cascade: {error}")
    if not _has_exponentials(imported.cascade):  # told before it is folded, which takes long
        return entry(anchor, Folded(imported, None), AS_WRITTEN, NO_EXPONENTIALS)
    found = folded(imported)
    if found.plan is None:
        return entry(anchor, found, AS_WRITTEN, found.reason)
    place = place_of(region, list(program.graph.nodes))
    if place.before is None:
        return entry(anchor, found, AS_WRITTEN, place.reason)
    inputs = [region.inputs[at] for at in reads_of(region, imported)]
    known = _known(program, region)
    named = {b.name: known[b.node].numpy() for b in imported.inputs if b.node in known}
    function = make(found.plan, replace(signature_of(region, imported), known=named))
    traced = _traced(program, region, inputs, known, function)
    if isinstance(traced, str):
        return entry(anchor, found, AS_WRITTEN, traced)
    _insert(program, region, place.before, inputs, traced)
    return entry(anchor, found, lowering, "", source_of(found, traced.graph))


def _known(program: Program, region: Region) -> dict[str, torch.Tensor]:
    """The masks that a region reads whose numbers the program has, by node."""
    found = {}
    for node in region.inputs:
        weight = program.weight_of(node)
        if weight is None or weight.dtype != torch.bool or weight.nbytes > _LARGEST:
            continue
        try:
            found[node.name] = weight.load()
        except IRError:  # a program made of a model's config alone
            continue
    return found


def _has_exponentials(cascade: Cascade) -> bool:
    parts = (part for item in cascade.statements for part in walk(item.expr))
    return any(isinstance(part, Apply) and part.op == "exp" for part in parts)


def _traced(
    program: Program,
    region: Region,
    inputs: list[fx.Node],
    known: Mapping[str, torch.Tensor],
    function: Function,
) -> fx.GraphModule | str:
    """The lowering as a graph over the program's types, or why it cannot stand for the region."""
    reads = [region.inputs.index(node) for node in inputs]
    random = zip(region.inputs, hints_of(region.inputs), strict=True)
    tensors = tuple(known.get(node.name, value) for node, value in random)
    trial = Trial(fx.GraphModule({}, extract(region)), tensors, reads)
    try:
        with Later():
            values = [node.meta["val"] for node in inputs]
            traced = trace_function(function, values, program.shapes.mode)
        wrong = differs(region, traced) or agrees(trial, function)
    except Exception as error:  # whatever it is, the region as written is right
        stop_on(error)
        return failure(error)
    if not wrong and traced.graph.find_nodes(op="get_attr"):
        wrong = "the lowering holds tensors of its own"
    return wrong or traced


def _insert(
    program: Program, region: Region, before: fx.Node, inputs: list[fx.Node], traced: fx.GraphModule
) -> None:
    holders = traced.graph.find_nodes(op="placeholder")
    copies: dict[fx.Node, Any] = dict(zip(holders, inputs, strict=True))
    editor = Editor(program)
    with editor.before(before):
        for node in traced.graph.nodes:
            if node.op != "call_function":
                continue
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), copies.__getitem__)
            call = normalise_call(node.target, args, kwargs)
            copies[node] = (
                call if isinstance(call, fx.Node) else editor.call(call[0], *call[1], **call[2])
            )
    (output,) = traced.graph.find_nodes(op="output")
    inside = set(region.nodes)
    for old, new in zip(region.outputs, output.args[0], strict=True):
        old.replace_all_uses_with(copies[new], delete_user_cb=lambda user: user not in inside)
    for node in reversed(region.nodes):
        program.graph.erase_node(node)
