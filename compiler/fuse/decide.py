"""What is done with a region: which lowering stands in its place, or why none does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import fx

from ...errors import UnsupportedError, stop_on
from ..codegen.cpu.frame import NotLoweredError, Signature
from ..codegen.cpu.one_tile import OneTile
from ..codegen.cpu.sdpa import ThroughSdpa
from ..codegen.triton.device import interpreting, without_kernels
from ..codegen.triton.through import ThroughKernels
from ..frontend.aten_kinds import REPEATS, WHOLE, name_of
from ..frontend.cascade.imported import Imported
from . import timings
from .folded import Folded, Function, Maker, folded, import_region, reads_of, signature_of
from .regions import Region
from .report import AS_WRITTEN
from .subgraphs import extract, key_of
from .trial import Trial, agrees, hints_of, measured, runs_here

#: A lowering is taken where it needs less than this share of the time of what was written.
MARGIN = 0.97
#: Of a plan on a CPU, in the order of preference where nothing is measured.
LOWERINGS: dict[str, Maker] = {
    "sdpa": ThroughSdpa,
    "one tile": OneTile,
}
#: Generated Triton kernels, one a plan, where there are any.
KERNEL = "kernel"


@dataclass(frozen=True)
class Decision:
    """What is done with every region of one key and one class of sizes.

    `functions` are lowerings, the best first; each takes those of the region's inputs that `reads` names
    by place. Without any the region stays.
    """

    lowering: str
    reason: str
    folded: Folded | None = None
    functions: tuple[tuple[str, Function], ...] = ()
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
        region, imported = import_region(graph, region)
    except UnsupportedError as error:
        _decisions[key] = Decision(AS_WRITTEN, f"not a cascade: {error}")
        return region, _decisions[key]
    key = (key_of(region), _size_class(region), measure)
    if key not in _decisions:
        _decisions[key] = _decision(region, imported, measure)
    return region, _decisions[key]


def _size_class(region: Region) -> tuple[int, ...]:
    """The symbolic sizes of the inputs to the next power of two."""
    found = []
    for node in region.inputs:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        found += [s.node.hint for s in sizes if isinstance(s, torch.SymInt)]
    return tuple(1 << max(int(size) - 1, 0).bit_length() for size in found)


def _decision(region: Region, imported: Imported, measure: str) -> Decision:
    found = folded(imported)
    makers = _makers(found, device_of(region))
    if not makers:
        return Decision(AS_WRITTEN, found.reason, found)
    if _is_one_kernel(region) and KERNEL not in makers:
        return Decision("sdpa", "", found)
    return _choose(region, found, makers, measure)


def _makers(found: Folded, device: torch.device) -> dict[str, Callable[[Signature], Function]]:
    """What may stand for a cascade on a device, in the order of preference.

    Kernels take several passes too. Where there are any, torch's own are no lowering: those hide on a CPU.
    """
    makers: dict[str, Callable[[Signature], Function]] = {}
    if found.folding is not None and not without_kernels(device.type):
        makers[KERNEL] = partial(ThroughKernels, found.folding.plans)
    if found.plan is not None and not (makers and interpreting()):
        names = ("one tile",) if makers else LOWERINGS
        makers |= {name: partial(LOWERINGS[name], found.plan) for name in names}
    return makers


def device_of(region: Region) -> torch.device:
    """Where the region's result is."""
    device: torch.device = region.anchor.meta["val"].device
    return device


def _is_one_kernel(region: Region) -> bool:
    """Whether the region is one attention operator already, on operands that nothing repeats."""
    whole = [node for node in region.nodes if name_of(node) in WHOLE]
    return bool(whole) and not any(name_of(node) in REPEATS for node in region.nodes)


def _choose(
    region: Region,
    found: Folded,
    makers: Mapping[str, Callable[[Signature], Function]],
    measure: str,
) -> Decision:
    signature = signature_of(region, found.imported)
    reads = reads_of(region, found.imported)
    trial = Trial(fx.GraphModule({}, extract(region)), hints_of(region.inputs), reads)
    why: list[str] = []
    able: dict[str, Function] = {}
    device = device_of(region)
    for name, make in makers.items():
        function = make(signature)
        try:
            wrong = agrees(trial, function) if runs_here(device) else ""
        except Exception as error:  # whatever it is, the region as written is right
            stop_on(error)
            wrong = failure(error)
        if wrong:
            why.append(f"{name}: {wrong}")
        else:
            able[name] = function
    if not able:
        return Decision(AS_WRITTEN, "no lowering on this device; " + "; ".join(why), found)
    if measure == "never" or not _is_worth_timing(device):
        return Decision("", "", found, tuple(able.items()), reads)
    seconds = _seconds(region, trial, able)
    faster = [name for name in able if seconds[name] < MARGIN * seconds[AS_WRITTEN]]
    if not faster:
        ratios = ", ".join(f"{n} {seconds[AS_WRITTEN] / seconds[n]:.2f}" for n in able)
        reason = f"left to Inductor, which was measured as fast (speed beside it: {ratios})"
        return Decision(AS_WRITTEN, reason, found, seconds=seconds)
    best = sorted(faster, key=lambda name: seconds[name])
    functions = tuple((name, able[name]) for name in best)
    return Decision("", "", found, functions, reads, seconds)


def _is_worth_timing(device: torch.device) -> bool:
    """Not in Triton's interpreter, nor where nothing runs."""
    return runs_here(device) and not (device.type == "cpu" and interpreting())


def _seconds(region: Region, trial: Trial, able: Mapping[str, Function]) -> dict[str, float]:
    """What is known of the region and its lowerings on this machine, or else is measured now."""
    key, device = f"{_size_class(region)}\n{key_of(region)}", device_of(region)
    seconds = timings.known(key, device)
    if seconds.keys() != {AS_WRITTEN, *able}:
        seconds = measured(trial, able, device)
        timings.keep(key, device, seconds)
    return seconds


def failure(error: Exception) -> str:
    """Why a lowering cannot be used."""
    if isinstance(error, NotLoweredError):
        return str(error)
    return f"it fails: {type(error).__name__}: {error}"
