"""Regions of an ATen graph, each as a cascade, folded, and lowered to what runs faster.

    graph -> regions -> cascade -> plan -> lowering -> graph

A region that cannot be imported, does not fold, or has no faster lowering stays in the graph as it was,
and its entry in the report says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import EinfoldError, UnsupportedError, stop_on
from ..analysis.cascade.choose import choose_rank
from ..analysis.cascade.fold import Folding
from ..analysis.cascade.plans import fold
from ..codegen.cpu.frame import NotLoweredError, Signature
from ..codegen.cpu.one_tile import OneTile
from ..codegen.cpu.sdpa import ThroughSdpa
from ..frontend.aten_kinds import WHOLE, name_of
from ..frontend.cascade.imported import Imported
from ..frontend.cascade.importer import import_graph
from ..frontend.dynamo import trace_function
from ..ir.cascade.printer import print_cascade
from ..ir.interrupts import Later
from . import timings
from .regions import Region, find_regions, region_at, region_of
from .report import AS_WRITTEN, FusedCascade, place_in_model
from .subgraphs import Place, extract, key_of, place_of
from .trial import Trial, agrees, hints_of, measured

Lowering = Callable[..., tuple[torch.Tensor, ...]]

#: A lowering is taken where it needs less than this share of the time of what was written.
MARGIN = 0.97
#: In the order of preference where nothing is measured.
LOWERINGS: dict[str, Callable[[Any, Signature], Lowering]] = {
    "sdpa": ThroughSdpa,
    "one tile": OneTile,
}


@dataclass(frozen=True)
class Decision:
    """What is done with every region of one key and one class of sizes.

    `functions` are lowerings, the best first; each takes those of the region's inputs that `reads` names
    by place. Without any the region stays.
    """

    lowering: str
    reason: str
    imported: Imported | None = None
    folding: Folding | None = None
    functions: tuple[tuple[str, Lowering], ...] = ()
    reads: tuple[int, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


#: Decisions of this process, by the region's key, its class of sizes and the way of choosing.
_decisions: dict[tuple[str, tuple[int, ...], str], Decision] = {}


def forget() -> None:
    """Drops all decisions, so that they are taken anew."""
    _decisions.clear()


def fuse(gm: fx.GraphModule, mode: FakeTensorMode, measure: str = "auto") -> list[FusedCascade]:
    """Replaces the regions of a graph in place; the report has one entry a region, in order."""
    entries: list[FusedCascade] = []
    for found in find_regions(gm.graph):
        # A region that reads another's result reads what stands in its place by now.
        region, decision = decide(gm.graph, region_of(found.nodes, found.anchor), measure)
        entries.append(_replace(gm, region, decision, mode))
    gm.graph.lint()
    gm.recompile()
    return entries


def decide(graph: fx.Graph, region: Region, measure: str) -> tuple[Region, Decision]:
    """The region without what no cascade expresses, and what to do with it."""
    key = (key_of(region), _size_class(region), measure)
    if key in _decisions:
        return region, _decisions[key]
    try:
        region, imported = _import(graph, region)
    except UnsupportedError as error:
        _decisions[key] = Decision(AS_WRITTEN, f"not a cascade: {error}")
        return region, _decisions[key]
    key = (key_of(region), _size_class(region), measure)
    if key not in _decisions:
        _decisions[key] = _decision(region, imported, measure)
    return region, _decisions[key]


def _import(graph: fx.Graph, region: Region) -> tuple[Region, Imported]:
    """The region's cascade. Nodes that become inputs of it are left outside, and what only they used."""
    outside: set[fx.Node] = set()
    places = {node: at for at, node in enumerate(graph.nodes)}
    for _ in range(8):
        imported = import_graph(extract(region))
        if not imported.opaque:
            return region, imported
        outside |= {node for node in region.nodes if node.name in imported.opaque}
        smaller = region_at(region.anchor, places, outside)
        if smaller is None:
            name, why = next(iter(imported.opaque.items()))
            raise UnsupportedError(f"{name}: {why}")
        region = smaller
    raise UnsupportedError("the region keeps changing while it is imported")


def _size_class(region: Region) -> tuple[int, ...]:
    """The symbolic sizes of the inputs to the next power of two."""
    found = []
    for node in region.inputs:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        found += [s.node.hint for s in sizes if isinstance(s, torch.SymInt)]
    return tuple(1 << max(int(size) - 1, 0).bit_length() for size in found)


def _decision(region: Region, imported: Imported, measure: str) -> Decision:
    try:
        rank = choose_rank(imported.cascade, imported.sizes)
        if not rank:
            return Decision(AS_WRITTEN, "nothing is reduced", imported)
        folding = fold(imported.cascade, rank)
    except EinfoldError as error:
        return Decision(AS_WRITTEN, f"not folded: {error}", imported)
    if folding.plan is None:
        return Decision(AS_WRITTEN, folding.reason, imported, folding)
    if _is_one_kernel(region):
        return Decision("sdpa", "", imported, folding)
    return _choose(region, imported, folding, measure)


def _is_one_kernel(region: Region) -> bool:
    """Whether the region is one attention operator already, on operands that nothing repeats."""
    repeats = {"expand", "repeat", "repeat_interleave"}
    whole = [node for node in region.nodes if name_of(node) in WHOLE]
    return bool(whole) and not any(name_of(node) in repeats for node in region.nodes)


def _choose(region: Region, imported: Imported, folding: Folding, measure: str) -> Decision:
    assert folding.plan is not None
    signature = _signature(region, imported)
    names = [node.name for node in region.inputs]
    reads = tuple(names.index(binding.node) for binding in imported.inputs)
    trial = Trial(fx.GraphModule({}, extract(region)), hints_of(region.inputs), reads)
    why: list[str] = []
    able: dict[str, Lowering] = {}
    for name, make in LOWERINGS.items():
        function = make(folding.plan, signature)
        try:
            wrong = agrees(trial, function)
        except Exception as error:  # whatever it is, the region as written is right
            stop_on(error)
            wrong = _failure(error)
        if wrong:
            why.append(f"{name}: {wrong}")
        else:
            able[name] = function
    if not able:
        return Decision(
            AS_WRITTEN, "no lowering on this device; " + "; ".join(why), imported, folding
        )
    if measure == "never":
        return Decision("", "", imported, folding, tuple(able.items()), reads)
    seconds = _seconds(region, trial, able)
    faster = [name for name in able if seconds[name] < MARGIN * seconds[AS_WRITTEN]]
    if not faster:
        ratios = ", ".join(f"{n} {seconds[AS_WRITTEN] / seconds[n]:.2f}" for n in able)
        reason = f"left to Inductor, which was measured as fast (speed beside it: {ratios})"
        return Decision(AS_WRITTEN, reason, imported, folding, seconds=seconds)
    best = sorted(faster, key=lambda name: seconds[name])
    functions = tuple((name, able[name]) for name in best)
    return Decision("", "", imported, folding, functions, reads, seconds)


def _seconds(region: Region, trial: Trial, able: Mapping[str, Lowering]) -> dict[str, float]:
    """What is known of the region and its lowerings on this machine, or else is measured now."""
    key = f"{_size_class(region)}\n{key_of(region)}"
    seconds = timings.known(key)
    if seconds.keys() != {AS_WRITTEN, *able}:
        seconds = measured(trial, able)
        timings.keep(key, seconds)
    return seconds


def _failure(error: Exception) -> str:
    """Why a lowering cannot be used."""
    if isinstance(error, NotLoweredError):
        return str(error)
    return f"it fails: {type(error).__name__}: {error}"


def _signature(region: Region, imported: Imported) -> Signature:
    dtypes = {node.name: node.meta["val"].dtype for node in region.outputs}
    return Signature(
        tuple((b.name, b.dims) for b in imported.inputs),
        tuple((b.name, b.dims) for b in imported.outputs),
        imported.sizes,
        tuple(dtypes[b.node] for b in imported.outputs),
    )


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
            wrong = _differs(region, traced)
        except Exception as error:  # whatever it is, the region as written is right
            stop_on(error)
            wrong = _failure(error)
        if wrong:
            why.append(f"{name}: {wrong}")
            continue
        for node, holder in zip(inputs, traced.graph.find_nodes(op="placeholder"), strict=True):
            holder._rename(node.name)
            holder.target = holder.name
        _insert(gm, region, place, inputs, traced)
        return _entry(region, decision, name, "", _source(decision, traced.graph))
    return _entry(region, decision, AS_WRITTEN, "; ".join(why))


def _differs(region: Region, traced: fx.GraphModule) -> str:
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
    folding, imported = decision.folding, decision.imported
    left = lowering == AS_WRITTEN
    if folding is not None and not folding.refusals and not left:
        reason = folding.reason
    return FusedCascade(
        place_in_model(region.anchor),
        "refused" if left else "fused",
        folding.passes_before if folding else 0,
        folding.passes_after if folding else 0,
        reason,
        lowering,
        source,
        print_cascade(imported.cascade) if imported else "",
        decision.seconds,
    )


def _source(decision: Decision, graph: fx.Graph) -> str:
    assert decision.imported is not None
    cascade = print_cascade(decision.imported.cascade).splitlines()[1:]
    code = fx.GraphModule({}, graph).code if not graph.find_nodes(op="get_attr") else str(graph)
    comment = "".join(f"# {line}\n" for line in cascade)
    return f"{comment}{code.strip().replace('def forward(self, ', 'def fused(')}\n"
