"""When a step reads, packs and computes, by the numbers of a plan: what `tiers.step_of` says in one number.

    disk     | read 3 |  read 5  | wait | read 6 | ..     what is read ahead has so much room, and no more
    engine   | 2 | wait | 3 |  4  |  5  | wait | 6 | ..   in order; a streamed super-op when it is there

Steps follow each other without a pause, so that the end of one reads for the next. Nothing is measured here:
each read takes its bytes by the disk's bandwidth, each run its weights, with its share of the cache, by that
of memory. Experts are read when they are chosen, behind what runs before them. Spilled slots of the cache
have stages of their own. Waits come of the order and of the room alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..ir.device import Device
from ..ir.kv.spill import STAGES
from .leveling import AHEAD
from .spill import Slots
from .tiers import Piece, TierPlan, step_of

#: Steps before the one that is told: by then what is read ahead has found its place.
_BEFORE = 3

#: Waits of fewer seconds, as a part of a step, are none: they come of rounding.
_NONE = 1e-9


@dataclass(frozen=True)
class Bar:
    """Something that one side does, in seconds from the start of the step."""

    kind: str
    """`read`, `pack`, `compute`, or `wait`."""
    name: str
    """The super-op that it is done for, or waited for."""
    start: float
    end: float
    index: int
    """Place of the super-op in the order."""


@dataclass(frozen=True)
class Timeline:
    """One step of one token in the middle of many."""

    seconds: float
    disk: tuple[Bar, ...]
    engine: tuple[Bar, ...]

    def spent(self, kind: str) -> float:
        """Seconds of the step that a side spends so; `wait` is the engine's for the disk."""
        return sum(bar.end - bar.start for bar in self._lane(kind) if bar.kind == kind)

    @property
    def disk_waits(self) -> float:
        """Seconds of the step that the disk waits for room."""
        return sum(bar.end - bar.start for bar in self.disk if bar.kind == "wait")

    def _lane(self, kind: str) -> tuple[Bar, ...]:
        return self.disk if kind == "read" else self.engine


def timeline_of(plan: TierPlan, device: Device) -> Timeline:
    """The steady state of a plan on a device."""
    runs = _Runs(plan, device)
    for _ in range(
        _BEFORE + 3
    ):  # what is read within the one that is told is of the next, or waits for it
        runs.step()
    start, end = runs.ends[_BEFORE - 1], runs.ends[_BEFORE]
    return Timeline(
        end - start,
        tuple(_within(_waits(runs.reads), start, end)),
        tuple(_within(_waits(runs.engine), start, end)),
    )


def seconds_of(plan: TierPlan, device: Device) -> float:
    """Those of its timeline."""
    runs = _Runs(plan, device)
    for _ in range(_BEFORE + 1):
        runs.step()
    return runs.ends[_BEFORE] - runs.ends[_BEFORE - 1]


class _Runs:
    """Steps one behind the other, as the threads that read and the engine take them."""

    def __init__(self, plan: TierPlan, device: Device) -> None:
        self._plan, self._device = plan, device
        self._streamed = list(plan.streamed)
        computed = sum(piece.computed for piece in plan.pieces)
        self._pace = step_of(plan, device).compute / computed if computed else 0.0
        self._ends: list[float] = []
        """When each streamed super-op that was read has run, step after step."""
        self._turns: list[float] = []
        """When each spilled layer of the cache has run, step after step."""
        self.reads: list[Bar] = []
        self.engine: list[Bar] = []
        self.ends: list[float] = []
        """Of each step."""
        self._now = 0.0

    def step(self) -> None:
        turn = None
        for index, piece in enumerate(self._plan.pieces):
            streamed = self._plan.tier_of(piece) == "streamed"
            if streamed:
                self._now = max(self._now, self._read(index, piece))
                if self._plan.packs:
                    self._run("pack", index, piece, piece.nbytes / self._device.pack_bandwidth)
            if self._plan.spill is not None and turn is None:
                turn = self._plan.spill.before(piece.name)
                if turn is not None:
                    self._now = max(self._now, self._read_slots(index, turn))
            self._run("compute", index, piece, piece.computed * self._pace)
            if streamed:
                self._ends.append(self._now)
            if turn is not None and turn.last == piece.name:
                self._turns.append(self._now)
                turn = None
        self.ends.append(self._now)

    def _read_slots(self, index: int, turn: Slots) -> float:
        """Reads a layer's slots as soon as the disk is free and there is a stage; gives when they are there.
        What a token writes is charged here too."""
        assert self._plan.spill is not None
        number = len(self._turns) - min(STAGES, len(self._plan.spill.slots))
        free = self.reads[-1].end if self.reads else 0.0
        start = max(free, self._turns[number] if number >= 0 else 0.0)
        end = start + (turn.nbytes + turn.token) / self._device.disk_bandwidth
        self.reads.append(Bar("read", f"cache of layer {turn.layer}", start, end, index))
        return end

    def _read(self, index: int, piece: Piece) -> float:
        """Reads a super-op as soon as the disk is free and there is room; gives when it is there."""
        if self._plan.by_units:
            return self._read_by_units(index, piece)
        free = self.reads[-1].end if self.reads else 0.0
        blocker = self._blocker(len(self._ends))
        start = max(free, self._ends[blocker] if blocker >= 0 else 0.0)
        if piece.choice is not None:
            start = max(start, self._now)
        end = start + self._plan.reads(piece) / self._device.disk_bandwidth
        self.reads.append(Bar("read", piece.name, start, end, index))
        return end

    def _read_by_units(self, index: int, piece: Piece) -> float:
        """The same where a part of it is read as soon as there is room for that; none of it before what there
        was of it in the step before has run."""
        number, room = len(self._ends), self._plan.ahead
        comes, reads = self._plan.comes(piece), self._plan.reads(piece)
        held = [self._comes_of(n) for n in range(max(0, number - len(self._streamed) + 1), number)]
        first = number - len(held)
        now = max(self._end_of(first - 1), self.reads[-1].end if self.reads else 0.0)
        done, free = 0, room - sum(held)
        for each in [*held, 0]:
            part = min(free, comes) - done
            if part > 0:
                now = max(now, self._end_of(first - 1))
                end = now + reads * part / comes / self._device.disk_bandwidth
                self._bar(Bar("read", piece.name, now, end, index))
                now, done = end, done + part
            first, free = first + 1, free + each
        return now

    def _bar(self, bar: Bar) -> None:
        """What the disk does, as one bar where it does not pause."""
        last = self.reads[-1] if self.reads else None
        if last is not None and (last.name, last.end) == (bar.name, bar.start):
            self.reads[-1] = replace(last, end=bar.end)
        else:
            self.reads.append(bar)

    def _comes_of(self, number: int) -> int:
        """Bytes that come with a streamed super-op, counted over all steps."""
        return self._plan.comes(self._streamed[number % len(self._streamed)])

    def _end_of(self, number: int) -> float:
        """When it has run; 0 before the first."""
        return self._ends[number] if number >= 0 else 0.0

    def _blocker(self, number: int) -> int:
        """Which of the streamed super-ops, counted over all steps, must have run before this one is read;
        below 0 for none."""
        each = self._streamed
        if not self._plan.paged:
            return number - min(AHEAD, len(each))
        first, held = number, self._plan.most(each[number % len(each)])
        while first > max(0, number - len(each) + 1):
            held += self._plan.most(each[(first - 1) % len(each)])
            if held > self._plan.ahead:
                break
            first -= 1
        return first - 1

    def _run(self, kind: str, index: int, piece: Piece, seconds: float) -> None:
        if seconds > 0:
            self.engine.append(Bar(kind, piece.name, self._now, self._now + seconds, index))
            self._now += seconds


def _waits(bars: Sequence[Bar]) -> Iterator[Bar]:
    """The same with what lies between: each waits for what comes behind."""
    before = bars[0].start if bars else 0.0
    for bar in bars:
        if bar.start > before:
            yield Bar("wait", bar.name, before, bar.start, bar.index)
        yield bar
        before = bar.end


def _within(bars: Iterator[Bar], start: float, end: float) -> Iterator[Bar]:
    """What of them lies in a step, in seconds from its start."""
    least = _NONE * (end - start)
    for bar in bars:
        first, last = max(bar.start, start), min(bar.end, end)
        if last - first > least:
            yield Bar(bar.kind, bar.name, first - start, last - start, bar.index)
