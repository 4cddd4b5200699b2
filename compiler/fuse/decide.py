"""What is done with a region: which lowering stands in its place, or why none does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

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
from . import timings
from .regions import Region, region_at
from .report import AS_WRITTEN
from .subgraphs import extract, key_of
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
            wrong = failure(error)
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


def failure(error: Exception) -> str:
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
