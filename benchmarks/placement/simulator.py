"""Steps one behind the other, as a disk that reads ahead and an engine take them; seconds of one.

    disk    | read 3 |  read 5  | wait | read 6 | ..     in order; each read waits for the disk and for room
    engine  | 2 | wait | 3 |  4  |  5  | wait | 6 | ..   in order; each run waits for what it reads

Every policy is a stream of the same accesses, a list a step, and so runs in the same machine: a super-op, the
seconds that it computes, and what is read for it, each with the access that must have run before, which gives
its room back. Of a plan of einfold's this gives the seconds of `compiler/memory/timeline.py`, which draws the
same (tests/benchmarks/test_placement.py holds the two together); policies that hold other super-ops from step
to step cannot be drawn there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from einfold.compiler.ir.device import Device
from einfold.compiler.ir.kv.spill import STAGES
from einfold.compiler.memory.leveling import AHEAD
from einfold.compiler.memory.tiers import TierPlan, step_of

#: Steps until what is read ahead, and what a cache holds, has found its place, and steps of which the mean is
#: told: as many as a policy takes that comes round in as many steps as there are super-ops.
BEFORE, TOLD = 12, 100


@dataclass(frozen=True)
class Read:
    """What the disk does for an access."""

    seconds: float
    after: int = -1
    """The access, counted from the first, that must have run before there is room; -1 for none."""
    late: bool = False
    """It is known only when what runs before has run."""


@dataclass(frozen=True)
class Access:
    """A super-op in a step."""

    seconds: float
    """Of packing and computing."""
    reads: tuple[Read, ...] = ()


class Window:
    """Room for what is read and has not run: bytes, or numbers of them."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._held = deque[tuple[str, int, int]]()

    def after(self, name: str, size: int, index: int) -> int:
        """Takes room until an access has run; gives the access that must have run before, -1 for none."""
        after = -1
        while self._held and (
            sum(each for _, each, _ in self._held) + size > self._room
            or any(name == other for other, _, _ in self._held)
        ):
            after = self._held.popleft()[2]
        self._held.append((name, size, index))
        return after

    def parts(self, name: str, size: int, index: int) -> Iterator[tuple[int, int]]:
        """The same where some of it is taken as soon as there is room for that: parts of the size, each with
        the access that must have run before."""
        after, done = -1, 0
        while any(name == other for other, _, _ in self._held):
            after = self._held.popleft()[2]
        while done < size:
            part = min(self._room - sum(each for _, each, _ in self._held), size) - done
            if part > 0:
                yield part, after
                done += part
            if done < size:
                after = self._held.popleft()[2]
        self._held.append((name, size, index))


def seconds(steps: Iterable[list[Access]], before: int = BEFORE, told: int = TOLD) -> float:
    """Seconds of a step, the mean of some in the middle of many."""
    disk = now = 0.0
    ran, ends = list[float](), [0.0]
    for step in islice(steps, before + told):
        for access in step:
            for read in access.reads:
                start = max(disk, ran[read.after] if read.after >= 0 else 0.0)
                disk = max(start, now if read.late else 0.0) + read.seconds
                now = max(now, disk)
            now += access.seconds
            ran.append(now)
        ends.append(now)
    return (ends[-1] - ends[before]) / told


def of_plan(plan: TierPlan, device: Device, whole: bool = False) -> Iterator[list[Access]]:
    """The accesses of a plan, step after step; `whole` has each super-op read where there is room for all."""
    computed = sum(piece.computed for piece in plan.pieces)
    pace = step_of(plan, device).compute / computed if computed else 0.0
    names = [piece.name for piece in plan.pieces]
    streamed = {piece.name for piece in plan.streamed}
    weights = Window(plan.ahead if plan.paged else min(AHEAD, len(streamed)))
    slots = Window(min(STAGES, len(plan.spill.slots)) if plan.spill is not None else 0)
    index = 0
    while True:
        step = list[Access]()
        for place, piece in enumerate(plan.pieces):
            reads, packing = list[Read](), 0.0
            if piece.name in streamed:
                size = plan.most(piece) if plan.paged else 1
                total = plan.reads(piece) / device.disk_bandwidth
                if plan.by_units and not whole:
                    parts = weights.parts(piece.name, size, index)
                    reads += [Read(total * part / size, after) for part, after in parts]
                else:
                    after = weights.after(piece.name, size, index)
                    reads.append(Read(total, after, late=piece.choice is not None))
                packing = 0.0 if plan.paged else piece.nbytes / device.pack_bandwidth
            turn = plan.spill.before(piece.name) if plan.spill is not None else None
            if turn is not None:
                last = index + names.index(turn.last) - place
                after = slots.after(piece.name, 1, last)
                moved = turn.nbytes + turn.token
                reads.append(Read(moved / device.disk_bandwidth, after))
            step.append(Access(packing + piece.computed * pace, tuple(reads)))
            index += 1
        yield step
