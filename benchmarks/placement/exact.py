"""The placement that moves the fewest bytes, by CP-SAT of ortools and by trying all.

    whole   super-ops stay or come whole, as a cache of layers would hold them, at either way of packing
    pages   of each super-op any number of units stays: what einfold places where weights are pages

Both say the same things in integers: what stays, the window of what comes, and where the
cache does not fit beside, which layers' slots are spilled, with their stages. ortools is imported here alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from einfold.compiler.ir.device import Device
from einfold.compiler.ir.kv.spill import STAGES
from einfold.compiler.memory.leveling import AHEAD
from einfold.compiler.memory.pinning import PACKED
from einfold.compiler.memory.spill import Spill
from einfold.compiler.memory.tiers import Load, TierPlan

from .baselines import filled, unplaced
from .simulator import of_plan, seconds


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    plan: TierPlan
    proved: bool
    """Whether none moves fewer bytes."""


def cp_sat(
    load: Load,
    budget: int,
    paged: bool,
    parts: bool,
    limit: float = 10.0,
    beside: int | None = None,
) -> Found | None:
    """The plan of the fewest bytes that CP-SAT finds in so many seconds of one thread; None where it finds
    none. Experts are not placed: what they read is no sum. Raises ImportError without ortools."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    plan = unplaced(load, budget, paged, beside=beside)
    unit = load.unit if parts else 1
    coming = [
        _Coming(model, piece, unit if parts else piece.held, paged) for piece in plan.streamed
    ]
    spilled = [model.new_bool_var(f"spill {slots.layer}") for slots in load.slots]
    memory = sum(each.stays for each in coming)
    windows = [(each.window, each.any) for each in coming]
    memory += _room_ahead(model, windows, AHEAD, plan.beside)
    if not paged:
        largest = model.new_int_var(0, max(each.piece.held for each in coming), "packed")
        for each in coming:
            model.add(largest >= each.piece.held).only_enforce_if(each.any)
        memory += PACKED * largest
        order = sorted(coming, key=lambda each: -each.piece.nbytes)
        for place, each in enumerate(order):
            before = sum(other.stays for other in order[: place + 1])
            loading = before + 2 * each.piece.nbytes + plan.fixed.total
            model.add(loading <= budget).only_enforce_if(~each.any)
    fixed = plan.fixed.total
    if spilled:
        stages = [
            (slots.stage * used, used) for slots, used in zip(load.slots, spilled, strict=True)
        ]
        fixed += _room_ahead(model, stages, STAGES)
        fixed -= sum(
            (slots.nbytes - slots.tail) * used
            for slots, used in zip(load.slots, spilled, strict=True)
        )
        files = sum(slots.file * used for slots, used in zip(load.slots, spilled, strict=True))
        model.add(files <= min(load.disk, 1 << 60))
    model.add(memory + fixed <= budget)
    if (
        paged and spilled
    ):  # while it is loaded a super-op is there as it lies in the file, and packed
        loading = max(piece.in_artifact + piece.held for piece in plan.pieces)
        model.add(loading + fixed <= budget)
    reads = sum(each.cost * each.count for each in coming)
    moves = sum((s.nbytes + s.token) * used for s, used in zip(load.slots, spilled, strict=True))
    model.minimize(reads + moves)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = limit
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    used = tuple(s for s, var in zip(load.slots, spilled, strict=True) if solver.value(var))
    found = unplaced(load, budget, paged, Spill(used) if used else None, beside)
    kept = {each.piece.name: each.piece.held - solver.value(each.held) for each in coming}
    whole = frozenset(each.piece.name for each in coming if not solver.value(each.any))
    some = {name: size for name, size in kept.items() if size and name not in whole}
    return Found(replace(found, pinned=whole, parts=some), status == cp_model.OPTIMAL)


class _Coming:
    """What of a super-op comes in every step, in units of which the last may be cut short."""

    def __init__(self, model: Any, piece: Any, unit: int, paged: bool) -> None:
        count = -(-piece.held // unit)
        self.piece = piece
        self.count = model.new_int_var(0, count, piece.name)
        self.any = model.new_bool_var(f"{piece.name} comes")
        model.add(self.count >= 1).only_enforce_if(self.any)
        model.add(self.count == 0).only_enforce_if(~self.any)
        self.stays = unit * (count - self.count) - (unit * count - piece.held) * (1 - self.any)
        self.held = piece.held - self.stays
        self.window = self.held if paged else piece.nbytes * self.any
        self.cost = round(piece.nbytes * unit / piece.held) if count > 1 else piece.nbytes


def _room_ahead(
    model: Any, sizes: list[tuple[Any, Any]], most: int, beside: int | None = None
) -> Any:
    """Room for as many of the largest as `most`, or as are used where that is fewer: with one, for it. With
    `beside` for the largest and so much, where that is less."""
    bound = 1 << 50
    largest = model.new_int_var(0, bound, "largest")
    several = model.new_bool_var("several")
    model.add(sum(used for _, used in sizes) <= 1).only_enforce_if(~several)
    room = model.new_int_var(0, most * bound, "room")
    for size, _ in sizes:
        model.add(largest >= size)
    if beside is None:
        model.add(room >= most * largest).only_enforce_if(several)
    else:
        small = model.new_bool_var("small")
        model.add(room >= most * largest).only_enforce_if(several, small)
        model.add(room >= largest + beside).only_enforce_if(several, ~small)
    model.add(room >= largest)
    return room


def every_whole(
    load: Load, budget: int, paged: bool, beside: int | None = None
) -> Iterator[TierPlan]:
    """All plans of whole super-ops that fit, with nothing spilled."""
    plan = unplaced(load, budget, paged, beside=beside)
    names = [piece.name for piece in plan.streamed]
    for count in range(len(names) + 1):
        for chosen in combinations(names, count):
            found = filled(plan, set(chosen))
            if found is not None:
                yield found


def fastest(
    load: Load, budget: int, paged: bool, device: Device, beside: int | None = None
) -> float | None:
    """Seconds of a step by the best plan of whole super-ops, by running all of them."""
    plans = every_whole(load, budget, paged, beside)
    every = (seconds(of_plan(plan, device), told=8) for plan in plans)
    return min(every, default=None)


def bound(load: Load, budget: int, device: Device) -> float:
    """Seconds below which no step is, whatever is held when: every byte is computed with, and those that
    memory has no room for are read, and packed where they are not pages.

    Memory is filled with what saves most a byte, weights or slots. Of experts a part that is held saves as
    much of what tokens ask for, or as the plan expects, which is more; what every token reads comes before.
    """
    pieces = [piece for piece in load.paged or load.pieces if piece.nbytes]
    slots = sum(entry.nbytes for entry in load.slots)
    room = budget - load.fixed.total + slots
    saved = [(entry.nbytes, entry.nbytes) for entry in load.slots]
    saved += [(piece.nbytes, piece.held) for piece in pieces if piece.choice is None]
    reads = 0.0
    for nbytes, held in sorted(saved, key=lambda pair: -pair[0] / pair[1]):
        part = min(room / held, 1.0)
        reads, room = reads + (1 - part) * nbytes, room - int(part * held)
    packs = 0.0 if load.paged or load.slots else reads / device.pack_bandwidth
    experts = [piece for piece in pieces if piece.choice is not None]
    if experts:
        part = min(room / sum(piece.held for piece in experts), 1.0)
        chosen = sum(piece.choice.nbytes for piece in experts if piece.choice is not None)
        reads += chosen * (1 - max(part, load.skew.hits(part)))
    computed = sum(piece.computed for piece in pieces) + load.fixed.cache
    return max(packs + computed / device.ram_bandwidth, reads / device.disk_bandwidth)
