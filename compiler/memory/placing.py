"""The placement of the fewest bytes that a token moves, under a budget.

pages of a packed file    what comes of each super-op by a level, the rest of it stays     leveling.py
  with experts            as many layers of them pinned as read least, the rest of the
                          room holds some of the others from token to token
packed in every step,     whole super-ops pinned, whatever is left of the budget           pinning.py
  or copied to a GPU
slots of the cache        spilled where nothing fits else, or steps take a good deal less  spill.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, inf

from ...errors import RecipeError
from ..ir.device import ASSUMED, Device
from .leveling import AHEAD, Units, come, in_proportion, least_level
from .pinning import Kind, Pinned, least, pin
from .spill import Spill, spills
from .tiers import Load, Piece, TierPlan, ahead_bytes, step_of
from .timeline import seconds_of

#: Which of equal super-ops are so many of them.
Spread = Callable[[Sequence[str], int], list[str]]

#: Parts of what every token reads that are left to experts, in trial.
_PARTS = 8

#: Times the seconds that a super-op computes by the plan for which there is room to read ahead.
_SURE = 2

#: Units that threads bring at once (READERS of runtime/memory/direct.py): with room for fewer some are idle.
UNDER_WAY = 3

#: Seconds of a step that are none, as a part of it.
_EQUAL = 1e-6

#: Times the seconds of a plan with slots spilled that one without must take for the former to be made: what
#: runs over a file costs beside is not all in a plan.
_SPILLS = 1.05

#: Plans that are gone through at most to have steps wait less.
_TRIES = 200


def place(load: Load, budget: int, device: Device = ASSUMED) -> TierPlan:
    """The placement whose peak is within the budget and whose steps take the least time on a device, which is
    among those that move the fewest bytes, or next to it.

    Pages of a packed file come before packing in every step, unless nothing is streamed. What every token
    reads comes before experts. Slots of the cache are spilled, as many as the disk has room for, where
    nothing fits else or steps take less by a twentieth. Raises RecipeError, which says the smallest budget
    that would do.
    """
    best = _Best(device)
    _offer(best, load, budget)
    spilled = _Best(device, seconds=best.seconds / _SPILLS)
    _offer_spilled(spilled, load, budget)
    found = best if spilled.plan is None else spilled
    if found.plan is None:
        raise _too_small(load, budget)
    _wait_less(found)
    return replace(found.plan, load=load)


@dataclass
class _Best:
    """The plan of the shortest steps so far, and among such of the fewest bytes; none before one takes less
    than the `seconds` that it begins with."""

    device: Device
    plan: TierPlan | None = None
    seconds: float = inf

    def offer(self, plan: TierPlan) -> bool:
        """Takes a plan that fits and is better. Gives whether another of as many bytes might be better still:
        this one waits, and would not be behind if it did not."""
        if plan.peak > plan.budget:
            return False
        least = step_of(plan, self.device).seconds
        if self._behind(least, plan):
            return False
        seconds = seconds_of(plan, self.device)
        if not self._behind(seconds, plan):
            self.plan, self.seconds = plan, seconds
        return seconds > least * (1 + _EQUAL)

    def _behind(self, seconds: float, plan: TierPlan) -> bool:
        if seconds < self.seconds * (1 - _EQUAL):
            return False
        if self.plan is None:
            return True
        more = (plan.moved, plan.peak) >= (self.plan.moved, self.plan.peak)
        return more or seconds > self.seconds * (1 + _EQUAL)


def _wait_less(best: _Best) -> None:
    """Pins others of the super-ops in place of those that are, one at a time, as long as steps get shorter:
    where whole ones are pinned, their order says how long the engine and the disk wait for each other."""
    tries, better = _TRIES, True
    while better and best.plan is not None and not best.plan.parts and tries > 0:
        plan, better = best.plan, False
        if best.seconds <= step_of(plan, best.device).seconds * (1 + _EQUAL):
            return
        for old, new in product(plan.kept, plan.streamed):
            pinned = plan.pinned - {old.name} | {new.name}
            best.offer(_filled(replace(plan, pinned=pinned, room=0)))
            tries -= 1
            better = best.plan is not plan
            if better or not tries:
                break


def spilling(load: Load, spill: Spill | None) -> Load:
    """The same with slots spilled."""
    if spill is None:
        return load
    fixed = replace(load.fixed, cache=load.fixed.cache - spill.freed())
    return replace(load, fixed=fixed, spill=spill)


def _offer_spilled(best: _Best, load: Load, budget: int) -> None:
    """Placements with slots spilled, but for those that cannot be the best."""
    spared = budget - least_plan(load).peak
    for spill in _promising(load, budget):
        if _hoped(load, budget, spill) / best.device.disk_bandwidth > best.seconds:
            break
        if spill.freed() + spared >= 0:
            _offer(best, spilling(load, spill), budget)


def every_spill(load: Load) -> list[Spill]:
    """What may be spilled, and the disk has room for."""
    return [s for series in spills(load.slots) for s in series if s.file <= load.disk]


def _promising(load: Load, budget: int) -> list[Spill]:
    """Spills that the disk has room for, but for those that move more than another and free no more, by what
    a token would move at least."""
    found, most = list[Spill](), 0
    for spill in sorted(every_spill(load), key=lambda spill: (spill.moved, -spill.freed())):
        if spill.freed() > most:
            found.append(spill)
            most = spill.freed()
    return sorted(found, key=lambda spill: _hoped(load, budget, spill))


def _hoped(load: Load, budget: int, spill: Spill) -> float:
    """Bytes that a token moves at least with a spill, beside experts: what memory holds of weights is not
    read."""
    room = budget - load.fixed.total + spill.freed()

    def reads(pieces: Sequence[Piece]) -> float:
        every = [piece for piece in pieces if piece.nbytes and piece.choice is None]
        density = max((piece.nbytes / piece.held for piece in every), default=0.0)
        return max(sum(piece.nbytes for piece in every) - room * density, 0.0)

    return spill.moved + min(reads(pieces) for pieces in (load.pieces, load.paged or load.pieces))


def _offer(best: _Best, load: Load, budget: int) -> None:
    """Placements of the weights that fit, one of which moves the fewest bytes."""
    plain = TierPlan(load.pieces, frozenset(), load.fixed, budget, remark=load.remark)
    plain = replace(plain, spill=load.spill, home=load.home)
    resident = replace(plain, pinned=frozenset(piece.name for piece in plain.streamed))
    paged = TierPlan(load.paged, frozenset(), load.fixed, budget, paged=True, skew=load.skew)
    paged = replace(paged, spill=load.spill)
    if load.paged and resident.peak <= budget:
        best.offer(resident)
        return
    fits = False
    for plan in _with_experts(paged) if load.paged else ():
        fits = _offer_pages(best, plan, load.unit) or fits
    if load.paged and not fits:
        fits = _offer_pages(best, _least_beside(paged, load.unit), load.unit)
    if not fits:
        _offer_packed(best, plain)
    elif paged.routed:
        _offer_spared(best, paged, load.unit)


def least_plan(load: Load) -> TierPlan:
    """The placement that takes the least memory."""
    plain = TierPlan(load.pieces, frozenset(), load.fixed, 0, remark=load.remark, home=load.home)
    kinds = [_kind(piece) for piece in plain.streamed]
    plans = [_pinned(plain, least(kinds, plain.window), _spread)]
    paged = TierPlan(load.paged, frozenset(), load.fixed, 0, paged=True, skew=load.skew)
    for made in _with_experts(paged) if load.paged else ():
        made = _least_beside(made, load.unit)
        units = _units(made, load.unit)
        most = max((piece.held for piece in made.routed), default=0)
        level = least_level(units, -(-most // load.unit), AHEAD if made.beside is None else 1)
        counts = [min(each.count, level) for each in units]
        plans.append(_leveled(made, counts, load.unit, made.beside))
    return replace(min(plans, key=lambda plan: plan.peak), spill=load.spill)


def _offer_packed(best: _Best, plain: TierPlan) -> None:
    """With whole super-ops pinned."""
    kinds = [_kind(piece) for piece in plain.streamed]
    found = pin(kinds, plain.budget - plain.fixed.total, plain.window)
    if found is not None and best.offer(_pinned(plain, found, _spread)):
        best.offer(_pinned(plain, found, _spread_to_the_end))
        _offer_whole(best, plain)


def _offer_whole(best: _Best, plan: TierPlan) -> None:
    """With as many super-ops pinned whole as fit, the first in order or the largest, over and over: what is
    read ahead takes less where the largest are pinned. Best where waits matter more than bytes."""
    largest = sorted(plan.streamed, key=lambda piece: (piece.choice is not None, -piece.nbytes))
    for order in (plan.streamed, largest):
        found, before = plan, None
        while before is not found:
            before = found
            for piece in order:
                more = replace(found, pinned=found.pinned | {piece.name})
                if piece.name not in found.pinned and more.peak <= plan.budget:
                    found = more
        if found.peak <= plan.budget:
            best.offer(_filled(found))


def _pinned(plain: TierPlan, kinds: Pinned, spread: Spread) -> TierPlan:
    """With so many of each kind pinned, evenly spread over the order, so that they run while the next is
    read."""
    names = set[str]()
    for kind, count in kinds.items():
        equal = [piece.name for piece in plain.pieces if _kind(piece) == kind]
        names.update(spread(equal, count))
    return replace(plain, pinned=frozenset(names))


def _offer_pages(best: _Best, plan: TierPlan, unit: int) -> bool:
    """A plan that says which experts are pinned, with as much of what every token reads as can stay. Gives
    whether one fits."""
    fits = waits = False
    for beside in dict.fromkeys((plan.beside, _beside(plan, best.device, unit))):
        found = _with_others(plan, unit, beside=beside)
        if found is None or found.peak > plan.budget:
            continue
        fits = True
        if best.offer(_filled(found)) and not plan.routed:
            waits = True
            for choose in (_alike, in_proportion):
                other = _with_others(plan, unit, beside=beside, choose=choose)
                best.offer(found if other is None else other)
    if waits:
        _offer_whole(best, plan)
    return fits


def _alike(every: Sequence[Units], room: int, ahead: int) -> list[int] | None:
    """What comes where a unit of each is as good as one of any other."""
    return come([replace(each, cost=1.0) for each in every], room, ahead=ahead)


def _beside(plan: TierPlan, device: Device, unit: int) -> int | None:
    """Bytes that the disk reads while the super-op computes that computes longest, by the plan's numbers and
    twice, since a busy machine takes longer, and units that are under way: with room for these it need not
    wait. None where super-ops are not read by units, or the device was not measured: with room for too
    little steps take longer."""
    if not plan.by_units or device.source == ASSUMED.source:
        return None
    computed = sum(piece.computed for piece in plan.pieces)
    pace = step_of(plan, device).compute / max(computed, 1)
    seconds = max((piece.computed for piece in plan.streamed), default=0) * pace
    return (ceil(_SURE * seconds * device.disk_bandwidth / unit) + UNDER_WAY) * unit


def _least_beside(plan: TierPlan, unit: int) -> TierPlan:
    """The same with as little room as may be for what is read ahead."""
    return replace(plan, beside=unit) if plan.by_units else plan


def _offer_spared(best: _Best, plan: TierPlan, unit: int) -> None:
    """Plans with less of what every token reads than could stay, where experts in its room save more: the
    first that stay do, and they are read when they are chosen, while the others are read ahead."""
    experts = frozenset(piece.name for piece in plan.routed)
    chosen = best.plan.pinned & experts if best.plan is not None else frozenset()
    total = sum(each.count for each in _units(plan, unit))
    powers = [1 << n for n in range(total.bit_length())]
    spared = {*powers, *(total * part // _PARTS for part in range(1, _PARTS + 1))}
    for pinned in dict.fromkeys((frozenset[str](), chosen)):
        for count in sorted(spared):
            found = _with_others(replace(plan, pinned=pinned), unit, count)
            if found is not None and found.peak <= plan.budget:
                best.offer(_filled(found))
    if plan.peak <= plan.budget:
        best.offer(_filled(plan))
    _offer_whole(best, plan)


def _with_others(
    plan: TierPlan,
    unit: int,
    spared: int = 0,
    beside: int | None = None,
    choose: Callable[[Sequence[Units], int, int], list[int] | None] | None = None,
) -> TierPlan | None:
    """What of super-ops that every token reads stays, in all the room that is left, less some units; None
    where nothing fits. Of pages so many bytes are read `beside` what runs; `choose` says otherwise what
    comes."""
    units = _units(plan, unit)
    if plan.routed and not spared:
        pinned = _leveled(plan, [0] * len(units), unit)
        if pinned.peak <= plan.budget:
            return pinned
    room = plan.budget - plan.fixed.total - sum(piece.held for piece in plan.kept)
    room, ahead = (room - (beside or 0)) // unit, AHEAD if beside is None else 1
    window = -(-max((piece.held for piece in plan.routed), default=0) // unit)
    needed = sum(each.count for each in units) + ahead * window
    room = min(room, needed) - spared
    counts = choose(units, room, ahead) if choose is not None else come(units, room, window, ahead)
    return None if counts is None else _leveled(plan, counts, unit, beside)


def _with_experts(plan: TierPlan) -> Iterator[TierPlan]:
    """The same with layers of experts pinned: all that are larger than a size, or beside what every token
    reads of each size none to all that fit, the largest first, equal ones evenly over their order."""
    kinds = sorted({_kind(piece) for piece in plan.routed}, reverse=True)
    equal = {kind: [p.name for p in plan.routed if _kind(p) == kind] for kind in kinds}
    others = sum(piece.held for piece in plan.streamed if piece.choice is None)
    room = plan.budget - plan.fixed.total - others
    pinned, larger = frozenset[str](), frozenset[str]()
    found = [pinned]
    for kind in kinds:
        found.append(larger := larger.union(equal[kind]))
        before = pinned
        for count in range(1, len(equal[kind]) + 1):
            names = before.union(_spread(equal[kind], count))
            window = ahead_bytes(p.held for p in plan.routed if p.name not in names)
            if window + sum(p.held for p in plan.routed if p.name in names) > room:
                break
            found.append(pinned := names)
    for names in dict.fromkeys(found):
        yield replace(plan, pinned=names)


def _spread(names: Sequence[str], count: int) -> list[str]:
    """So many of them, evenly over their order."""
    return [names[index * len(names) // count] for index in range(count)]


def _spread_to_the_end(names: Sequence[str], count: int) -> list[str]:
    """The same with the last of each stretch in place of the first."""
    return _spread(names[::-1], count)


def _kind(piece: Piece) -> Kind:
    return Kind(piece.nbytes, piece.held)


def _units(plan: TierPlan, unit: int) -> list[Units]:
    """Streamed super-ops that every token reads whole, in units."""
    return [
        Units(-(-piece.held // unit), piece.nbytes / piece.held)
        for piece in plan.streamed
        if piece.choice is None
    ]


def _leveled(
    plan: TierPlan, counts: Sequence[int], unit: int, beside: int | None = None
) -> TierPlan:
    """The same where so many units of each of these come in every step, and the others stay."""
    pinned, parts = set(plan.pinned), dict[str, int]()
    pieces = [piece for piece in plan.streamed if piece.choice is None]
    for piece, units, count in zip(pieces, _units(plan, unit), counts, strict=True):
        if not count:
            pinned.add(piece.name)
        elif count < units.count:
            parts[piece.name] = (units.count - count) * unit
    return replace(plan, pinned=frozenset(pinned), parts=parts, beside=beside)


def _filled(plan: TierPlan) -> TierPlan:
    """The same with what is left of the budget for experts that stay."""
    lacking = plan.experts - plan.cached
    return replace(plan, room=min(lacking, plan.budget - plan.peak)) if lacking else plan


def _too_small(load: Load, budget: int) -> RecipeError:
    """Says the least budget with or without slots spilled, and what it goes to."""
    plan = min(
        (
            least_plan(found)
            for found in [load, *(spilling(load, s) for s in _promising(load, budget))]
        ),
        key=lambda plan: plan.peak,
    )
    fixed = plan.fixed
    spilled = f" (of {plan.cache:,}, the rest spilled)" if plan.spill is not None else ""
    shared = f", weights of no super-op alone {fixed.shared:,}" if fixed.shared else ""
    return RecipeError(
        f"a budget of {budget:,} bytes is too small: {plan.peak:,} are needed at least, of which the "
        f"process takes {fixed.process:,}, the cache {fixed.cache:,}{spilled}{shared} and activations "
        f"{fixed.activations:,}, and the rest is the super-op that runs and those that are read ahead; "
        "give more, or a shorter context or a smaller chunk"
        + (f" (weights cannot be pages of a file: {load.remark})" if load.remark else "")
        + (f" (the cache cannot be spilled: {load.unspilled})" if load.unspilled else "")
        + _lacking(load)
    )


def _lacking(load: Load) -> str:
    """Says that some slots cannot be spilled for want of room on the disk; "" where all can."""
    every = max((spill.file for found in spills(load.slots) for spill in found), default=0)
    if every <= load.disk:
        return ""
    return (
        f" (not all of the cache can be spilled: it takes {every:,} bytes on the disk of the cache folder, "
        f"which has {load.disk:,} free; free some, or set EINFOLD_CACHE to a folder on another disk)"
    )
