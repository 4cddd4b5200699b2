"""What others would do with the same super-ops, budget and window: names, and seconds of a step by each.

all streamed          nothing stays
pinned prefix         the first super-ops stay, as many as fit: layers on a device, as llama.cpp counts them
greedy, repacked      the largest stays that fits, over and over, with the window of what is left each time
LRU                   a cache of whole super-ops beside the window; what was used longest ago is let go
Belady                the same; what is used again last is let go, or not held at all: it knows what comes
rotating              Belady's, with all memory for the cache and no window: what is read takes the place of
                      what has just run, so that reading waits for it, or of the one before that

The first five have the constraints of einfold's plans. The last has a freedom that these do not: which
super-ops are held changes from step to step. Spilled slots of the cache are, for all, as few as it takes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from einfold.compiler.ir.device import Device
from einfold.compiler.memory.leveling import AHEAD
from einfold.compiler.memory.placing import every_spill
from einfold.compiler.memory.spill import Spill
from einfold.compiler.memory.tiers import Load, Piece, TierPlan, ahead_bytes

from .simulator import Access, Read, Window, of_plan, seconds

#: Seconds of a step within a budget; None where nothing fits.
Baseline = Callable[[TierPlan, Device], float | None]


def unplaced(
    load: Load, budget: int, paged: bool, spill: Spill | None = None, beside: int | None = None
) -> TierPlan:
    """Nothing pinned, with slots spilled, and with so much room beside what runs, unless tokens choose
    experts."""
    cache = load.fixed.cache - (spill.freed() if spill is not None else 0)
    pieces = load.paged if paged else load.pieces
    fixed = replace(load.fixed, cache=cache)
    plan = TierPlan(
        pieces, frozenset(), fixed, budget, paged=paged, skew=load.skew, spill=spill, load=load
    )
    return replace(plan, beside=beside) if plan.by_units else plan


def filled(plan: TierPlan, pinned: set[str]) -> TierPlan | None:
    """With super-ops pinned, and room for experts; None where that does not fit."""
    found = replace(plan, pinned=frozenset(pinned))
    if found.peak > found.budget:
        return None
    lacking = found.experts - found.cached
    return replace(found, room=min(lacking, found.budget - found.peak)) if lacking else found


def prefix(plan: TierPlan) -> TierPlan | None:
    names = [piece.name for piece in plan.streamed]
    fitting = (filled(plan, set(names[:count])) for count in range(len(names), -1, -1))
    return next((found for found in fitting if found is not None), None)


def greedy(plan: TierPlan) -> TierPlan | None:
    """What larger ones leave no room for may fit once the window is smaller, so it goes round again."""
    order = sorted(plan.streamed, key=lambda piece: (piece.choice is not None, -piece.nbytes))
    found, pinned = filled(plan, set()), set[str]()
    while True:
        before = len(pinned)
        for piece in order:
            more = filled(plan, pinned | {piece.name}) if piece.name not in pinned else None
            if more is not None:
                found, pinned = more, pinned | {piece.name}
        if len(pinned) == before:
            return found


def _static(choose: Callable[[TierPlan], TierPlan | None]) -> Baseline:
    def found(plan: TierPlan, device: Device) -> float | None:
        chosen = choose(plan)
        return None if chosen is None else seconds(of_plan(chosen, device))

    return found


def _cached(belady: bool, plan: TierPlan, device: Device) -> float | None:
    room, window = plan.budget - plan.peak, plan.buffers if plan.paged else AHEAD
    return None if room < 0 else seconds(_cache(belady, plan, device, room, window))


def _cache(
    belady: bool, plan: TierPlan, device: Device, room: int, ahead: int
) -> Iterator[list[Access]]:
    """LRU takes in what has run; Belady's does where there is room beside, since nothing is used later."""
    held, window, index = OrderedDict[str, int](), Window(ahead), 0
    for plain in of_plan(plan, device, whole=True):
        step = []
        for access, piece in zip(plain, plan.pieces, strict=True):
            own, others = _split(access, piece)
            if piece.name in held:
                held.move_to_end(piece.name)
                step.append(Access(_computing(access, piece, plan, device), others))
            else:
                if own is not None:
                    reads = _read(own, piece, plan, window, index)
                    others = (*reads, *others)
                    while not belady and held and sum(held.values()) + piece.held > room:
                        held.popitem(last=False)
                    if sum(held.values()) + piece.held <= room:
                        held[piece.name] = piece.held
                step.append(Access(access.seconds, others))
            index += 1
        yield step


def _read(own: Read, piece: Piece, plan: TierPlan, window: Window, index: int) -> Iterator[Read]:
    """A super-op's read once there is room, or in parts."""
    if plan.by_units:
        for part, after in window.parts(piece.name, piece.held, index):
            yield replace(own, seconds=own.seconds * part / piece.held, after=after)
    else:
        size = piece.held if plan.paged else 1
        yield replace(own, after=window.after(piece.name, size, index))


def _split(access: Access, piece: Piece) -> tuple[Read | None, tuple[Read, ...]]:
    """The read of its weights, if any, and the others."""
    return (access.reads[0], access.reads[1:]) if piece.nbytes else (None, access.reads)


def _computing(access: Access, piece: Piece, plan: TierPlan, device: Device) -> float:
    """Seconds of a super-op that lies packed."""
    return access.seconds - (0.0 if plan.paged else piece.nbytes / device.pack_bandwidth)


def _rotating(plan: TierPlan, device: Device) -> float | None:
    """The better of two: what has just run may be let go, or not."""
    room = plan.budget - plan.fixed.total
    sizes = [piece.held for piece in plan.streamed]
    if room < ahead_bytes(sizes) or not plan.paged or plan.routed:
        return None
    every = (seconds(_rotation(plan, device, room, kept)) for kept in range(AHEAD))
    return min(every)


def _rotation(plan: TierPlan, device: Device, room: int, kept: int) -> Iterator[list[Access]]:
    """`kept` of those that ran last are not let go where others can be."""
    held, ran, index = dict[str, int](), dict[str, int](), 0
    for plain in of_plan(plan, device, whole=True):
        step = []
        for access, piece in zip(plain, plan.pieces, strict=True):
            own, reads = _split(access, piece)
            if own is not None and piece.name not in held:
                after = -1
                while sum(held.values()) + piece.held > room:
                    order = sorted(held, key=lambda name: -ran[name])
                    gone = (order[kept:] or order)[0]  # what ran last is used again last
                    after = max(after, ran[gone])
                    del held[gone]
                reads = (replace(own, after=after), *reads)
                held[piece.name] = piece.held
            ran[piece.name] = index
            step.append(Access(access.seconds, reads))
            index += 1
        yield step


BASELINES: dict[str, Baseline] = {
    "all streamed": _static(lambda plan: filled(plan, set())),
    "pinned prefix": _static(prefix),
    "greedy": _static(greedy),
    "LRU": partial(_cached, False),
    "Belady": partial(_cached, True),
    "rotating": _rotating,
}


def measured(
    name: str, load: Load, budget: int, paged: bool, device: Device, beside: int | None = None
) -> float | None:
    """Seconds of a step by a baseline, with as little of the cache spilled as it takes; None where that does
    not fit at all."""
    for spill in (None, *sorted(every_spill(load), key=lambda spill: spill.moved)):
        found = BASELINES[name](unplaced(load, budget, paged, spill, beside), device)
        if found is not None:
            return found
    return None
