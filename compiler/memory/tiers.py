"""Which weights stay in memory and which come from the disk in every step, under a budget.

    super-ops with bytes, a budget, a device
      -> place     which are pinned, which streamed, the bytes of both and of the buffers between
      -> step      seconds of a step: the disk reads ahead while super-ops are packed and computed

Where weights lie packed in a file that the engine reads where it is mapped, those that are streamed are pages
of it (`paged`): nothing is packed in a step, and what is read ahead are the packed bytes.

Every weight is read once in a step, so of two super-ops the one with more bytes in the file is the better to
keep, and nothing learned from the past helps. Where all but C bytes of W are fetched, no step is faster than
(W - C) / bandwidth of the disk, where the cost model of "LLM in a flash" (Alizadeh et al., 2023) starts. Its
windowing needs sparse activations and is not here. Compute is a roofline as LLM-Viewer's (Yuan et al., 2024):
a step of one token reads every weight and the cache once.

Of experts a token reads those alone that it chose, and which others chose before tells something of what
comes: of these, units stay from token to token in what room there is. It competes with pinning, by the bytes
that a token is expected to read: `TierPlan.hits`.

Where the cache itself is larger than what is left of the budget, slots of some layers are read in every step
too (spill.py).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ...errors import RecipeError
from ..ir.device import Device
from .spill import Slots, Spill, spills

#: Super-ops that are read ahead of the one that runs.
AHEAD = 2

#: Packed super-ops that the process holds while one runs: that one, and as much that the C library has not
#: given back of those before (measured: up to half of the largest).
PACKED = 2

#: Spills that are looked at where so much must be spilled for a plan to fit.
_MORE = 4

#: Exponents that a run may say; what lies outside is chance.
_EVEN = (0.05, 2.0)


@dataclass(frozen=True)
class Choice:
    """What one token reads of a super-op whose tokens choose experts."""

    nbytes: int
    """Bytes in the file, on average."""
    held: int
    """Bytes in memory at most."""


@dataclass(frozen=True)
class Piece:
    """The weights of a super-op: bytes in the file, and bytes in memory once the engine has packed them."""

    name: str
    nbytes: int
    held: int
    choice: Choice | None = None
    """None where a token reads all."""

    @property
    def most(self) -> int:
        """Bytes in memory of what one token reads at most."""
        return self.held if self.choice is None else self.choice.held

    @property
    def computed(self) -> int:
        """Bytes of what one token computes with."""
        return self.held if self.choice is None else self.choice.nbytes


@dataclass(frozen=True)
class Skew:
    """How unevenly experts are chosen: where a part of them is held, it is chosen `part ** exponent` of the
    times. At random the exponent is 1, below it the same are chosen often."""

    exponent: float = 0.5
    measured: bool = False
    """By runs; else it is assumed, and more than the models gave that were measured (docs/memory.md)."""

    @classmethod
    def of(cls, part: float, hits: float) -> Skew:
        """What a run with a part of the experts held says that found so much of what tokens asked for."""
        if not (0 < part < 1 and 0 < hits < 1):
            return cls()
        exponent = math.log(hits) / math.log(part)
        return cls(min(max(exponent, _EVEN[0]), _EVEN[1]), measured=True)

    def hits(self, part: float) -> float:
        """The part of what tokens ask for that is held."""
        return min(part, 1.0) ** self.exponent if part > 0 else 0.0


@dataclass(frozen=True)
class Fixed:
    """Bytes that are held whatever lies where."""

    process: int
    cache: int
    """Of the cache what is in memory."""
    activations: int

    @property
    def total(self) -> int:
        return self.process + self.cache + self.activations


@dataclass(frozen=True)
class Load:
    """What an artifact takes of memory."""

    pieces: tuple[Piece, ...]
    """Super-ops in the order in which they run."""
    fixed: Fixed
    paged: tuple[Piece, ...] = ()
    """The same where weights are pages of a file that holds them packed; none where that cannot be."""
    remark: str = ""
    """Why it cannot be."""
    skew: Skew = Skew()
    slots: tuple[Slots, ...] = ()
    """Layers whose slots of the cache may be spilled, in order."""
    unspilled: str = ""
    """Why none may be."""
    disk: int = 1 << 62
    """Free bytes of the disk that the file of spilled slots would lie on."""
    spill: Spill | None = None
    """Those that are; `fixed` is without them."""


@dataclass(frozen=True)
class TierPlan:
    """What lies where."""

    pieces: tuple[Piece, ...]
    """Every super-op, in the order in which they run."""
    pinned: frozenset[str]
    fixed: Fixed
    budget: int
    paged: bool = False
    """Streamed weights are pages of a file that holds them packed; else they are packed in every step."""
    remark: str = ""
    """Why they are not."""
    room: int = 0
    """Bytes for experts that stay from token to token, beside what is read ahead."""
    skew: Skew = Skew()
    spill: Spill | None = None
    """Layers whose slots of the cache lie in a file between their turns; None where all are in memory."""
    load: Load | None = None
    """What was placed, with nothing spilled yet; None of a plan that was laid out by hand."""

    @property
    def streamed(self) -> tuple[Piece, ...]:
        """Those that are read in every step; without weights there is nothing to read."""
        return tuple(p for p in self.pieces if p.nbytes and p.name not in self.pinned)

    @property
    def kept(self) -> tuple[Piece, ...]:
        return tuple(p for p in self.pieces if p.nbytes and p.name in self.pinned)

    def tier_of(self, piece: Piece) -> str:
        """`pinned`, `streamed`, or `mapped` where it only looks rows up in the file."""
        return (
            "mapped" if not piece.nbytes else "pinned" if piece.name in self.pinned else "streamed"
        )

    @property
    def routed(self) -> tuple[Piece, ...]:
        """Streamed ones whose tokens choose experts."""
        return tuple(piece for piece in self.streamed if piece.choice is not None)

    def reads(self, piece: Piece) -> int:
        """Bytes of a streamed super-op that a step of one token reads from the disk; of experts those that
        are not expected to be held."""
        if piece.choice is None:
            return piece.nbytes
        return round(piece.choice.nbytes * (1 - self.hits))

    @property
    def fetched(self) -> int:
        """Bytes of weights that a step of one token reads from the disk."""
        return sum(self.reads(piece) for piece in self.streamed)

    @property
    def cache(self) -> int:
        """Bytes of the whole cache."""
        return self.fixed.cache + (self.spill.freed() if self.spill is not None else 0)

    @property
    def moved(self) -> int:
        """Bytes that a step of one token reads from the disk and writes there: weights, and slots of the
        cache where the context is full."""
        spilled = self.spill.nbytes + self.spill.written if self.spill is not None else 0
        return self.fetched + spilled

    @property
    def prompt(self) -> int:
        """Bytes of weights that a step of many tokens reads from the disk at most: they choose every
        expert."""
        return sum(piece.nbytes for piece in self.streamed)

    @property
    def buffers(self) -> int:
        """Bytes of the buffers that are read into, or of the pages that are read ahead."""
        return buffer_bytes(self.streamed, self.paged)

    @property
    def ahead(self) -> int:
        """Bytes of the pages that are read ahead in a step of one token, beside what it chose of a layer's
        experts; they leave room for a prompt's."""
        most = max((piece.most for piece in self.streamed), default=0)
        grows = max((piece.held - piece.most for piece in self.streamed), default=0)
        experts = max((piece.most for piece in self.routed), default=0)
        ahead = ahead_bytes(piece.held for piece in self.streamed if piece.choice is None)
        return max(min(ahead + experts, self.buffers - grows), most)

    @property
    def experts(self) -> int:
        """Bytes of streamed experts in memory."""
        return sum(piece.held for piece in self.routed)

    @property
    def cached(self) -> int:
        """Bytes of experts that are held from token to token: their room, and what of the pages that are read
        ahead a step of one token does not need."""
        return min(self.room + self.buffers - self.ahead, self.experts) if self.routed else 0

    @property
    def hits(self) -> float:
        """The part of the experts that a token asks for which is expected to be held."""
        return self.skew.hits(self.cached / self.experts) if self.routed else 0.0

    @property
    def peak(self) -> int:
        """Bytes of the process at its largest: while it runs, or while it is loaded.

        Pinned weights are packed one super-op after the other, the largest first. Then they are there three
        times: as they were read, as the engine takes them, and packed. With pages nothing is resident then
        but the super-op whose session is made, as it lies in the file and packed.
        """
        if self.paged:
            held = sum(piece.held for piece in self.kept)
            loading = max((piece.nbytes + piece.held for piece in self.pieces), default=0)
            return self.fixed.total + max(held + self.buffers + self.room, loading)
        held = loading = 0
        for piece in sorted(self.kept, key=lambda piece: -piece.nbytes):
            held += piece.held
            loading = max(loading, held + 2 * piece.nbytes)
        running = held + self.buffers + PACKED * max((p.held for p in self.streamed), default=0)
        return self.fixed.total + max(running, loading)


@dataclass(frozen=True)
class Step:
    """Seconds that a step of one token takes, by the device's numbers."""

    disk: float
    packing: float
    compute: float
    chosen: float = 0.0
    """Of the disk's seconds those for experts, which are read when they are chosen and not ahead."""

    @property
    def seconds(self) -> float:
        """One thread reads ahead while the others pack and compute, and wait for experts."""
        return self.chosen + max(self.disk - self.chosen, self.packing + self.compute)

    @property
    def bound(self) -> str:
        """`disk`, `packing` or `compute`: what would have to be faster."""
        if self.disk >= self.packing + self.compute:
            return "disk"
        return "packing" if self.packing > self.compute else "compute"


def buffer_bytes(streamed: Sequence[Piece], paged: bool = False) -> int:
    """Bytes of the buffers that hold what is read ahead; no more buffers than there is to read."""
    return ahead_bytes(piece.held if paged else piece.nbytes for piece in streamed)


def ahead_bytes(sizes: Iterable[int]) -> int:
    """Bytes of as many of the largest as are read ahead."""
    every = list(sizes)
    return min(AHEAD, len(every)) * max(every, default=0)


def step_of(plan: TierPlan, device: Device) -> Step:
    """What a step of one token costs."""
    computed = sum(piece.computed for piece in plan.pieces)
    chosen = sum(plan.reads(piece) for piece in plan.routed)
    return Step(
        plan.moved / device.disk_bandwidth,
        0.0 if plan.paged else plan.fetched / device.pack_bandwidth,
        (computed + plan.cache) / device.ram_bandwidth,
        chosen / device.disk_bandwidth,
    )


def place(load: Load, budget: int) -> TierPlan:
    """The placement of the fewest bytes that a token moves whose peak is within the budget.

    For each size that the largest streamed super-op may have, what is larger is pinned and the rest of the
    budget goes to the others, the largest first; among equals evenly over the order, so that pinned super-ops
    run while the next is read. Pages of a packed file come before packing in every step, unless nothing
    is streamed. What every token reads comes before experts; of these as many layers are pinned, and the rest
    of the budget holds as much of the others, as together read least. Slots of the cache are spilled where
    nothing fits else, as many as the disk has room for. Raises RecipeError, which says the
    smallest budget that would do.
    """
    fitting = _placed(load, budget)
    if not fitting:
        spilling = [
            [_spilling(load, spill) for spill in found if spill.file <= load.disk]
            for found in spills(load.slots)
        ]
        fitting = [plan for found in spilling for plan in _least_spilled(found, budget)]
    if not fitting:
        raise _too_small([load, *(found[-1] for found in spilling if found)], budget)
    chosen = min(fitting, key=lambda found: (found.moved, found.peak))
    return replace(chosen, load=load)


def _spilling(load: Load, spill: Spill) -> Load:
    """The same with slots spilled."""
    fixed = replace(load.fixed, cache=load.fixed.cache - spill.freed())
    return replace(load, fixed=fixed, spill=spill)


def _least_spilled(loads: Sequence[Load], budget: int) -> list[TierPlan]:
    """Placements of the first of these loads that fits, each of which holds less than the one before, and of
    a few behind it: there another super-op may stay whose bytes are more than those of a layer's slots."""
    first = bisect_left(loads, True, key=lambda load: _fits(load, budget))
    return [plan for load in loads[first : first + _MORE] for plan in _placed(load, budget)]


def _fits(load: Load, budget: int) -> bool:
    plans = [_plain(load, budget), *([_paged(load, budget)] if load.paged else ())]
    return any(found.peak <= budget for plan in plans for found in _choices(plan))


def _plain(load: Load, budget: int) -> TierPlan:
    """Nothing pinned."""
    plan = TierPlan(load.pieces, frozenset(), load.fixed, budget, remark=load.remark)
    return replace(plan, spill=load.spill)


def _paged(load: Load, budget: int) -> TierPlan:
    return replace(_plain(load, budget), pieces=load.paged, paged=True, skew=load.skew)


def _placed(load: Load, budget: int) -> list[TierPlan]:
    """Placements of the weights that fit."""
    fitting = _fitting(_plain(load, budget))
    if load.paged and all(found.streamed for found in fitting):
        fitting = _fitting(_paged(load, budget)) or fitting
    return fitting


def _too_small(loads: Sequence[Load], budget: int) -> RecipeError:
    """Says the least budget of several loads, and what it goes to."""
    found = [
        plan
        for load in loads
        for plan in (
            *_choices(_plain(load, budget)),
            *(_choices(_paged(load, budget)) if load.paged else ()),
        )
    ]
    least = min(found, key=lambda plan: plan.peak, default=_plain(loads[0], budget))
    fixed, first = least.fixed, loads[0]
    spilled = f" (of {least.cache:,}, the rest spilled)" if least.spill is not None else ""
    return RecipeError(
        f"a budget of {budget:,} bytes is too small: {least.peak:,} are needed at least, of which the "
        f"process takes {fixed.process:,}, the cache {fixed.cache:,}{spilled} and activations "
        f"{fixed.activations:,}, and the rest is the super-op that runs and those that are read ahead; "
        "give more, or a shorter context or a smaller chunk"
        + (f" (weights cannot be pages of a file: {first.remark})" if first.remark else "")
        + (f" (the cache cannot be spilled: {first.unspilled})" if first.unspilled else "")
        + _lacking(first)
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


def _fitting(plain: TierPlan) -> list[TierPlan]:
    return [_filled(found) for found in _choices(plain) if found.peak <= found.budget]


def _filled(plan: TierPlan) -> TierPlan:
    """The same with what is left of the budget for experts that stay."""
    lacking = plan.experts - plan.cached
    return replace(plan, room=min(lacking, plan.budget - plan.peak)) if lacking else plan


def _choices(plain: TierPlan) -> Iterator[TierPlan]:
    """Plans with super-ops pinned, for each size of the largest that is streamed."""
    pieces = plain.pieces
    for limit in sorted({0, *(piece.nbytes for piece in pieces)}):
        pinned = {piece.name for piece in pieces if piece.nbytes > limit}
        yield replace(plain, pinned=frozenset(pinned))
        kinds = {_kind(piece) for piece in pieces if 0 < piece.nbytes <= limit}
        for kind in sorted(kinds):
            equal = [p.name for p in pieces if _kind(p) == kind and p.name not in pinned]
            routed = kind[0]
            most, before = _most(plain, pinned, equal), frozenset(pinned)
            for count in range(1 if routed else most, most + 1):
                pinned = {*before, *_spread(equal, count)}
                yield replace(plain, pinned=frozenset(pinned))


def _kind(piece: Piece) -> tuple[bool, int, int]:
    """What is pinned one behind the other, in this order: experts last, the largest first."""
    return piece.choice is not None, -piece.nbytes, -piece.held


def _most(plain: TierPlan, pinned: set[str], equal: Sequence[str]) -> int:
    """How many of equal super-ops can be pinned beside others."""
    for count in range(len(equal), 0, -1):
        names = frozenset(pinned | set(equal[:count]))
        if replace(plain, pinned=names).peak <= plain.budget:
            return count
    return 0


def _spread(names: Sequence[str], count: int) -> list[str]:
    """So many of them, evenly over their order."""
    return [names[index * len(names) // count] for index in range(count)]
