"""The packing problem: buffers that live for a while, and what holds of any places for them."""

from __future__ import annotations

from bisect import bisect, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Buffer:
    """`size` bytes that are in use from step `start` up to, and not at, step `end`."""

    start: int
    end: int
    size: int

    def __post_init__(self) -> None:
        if self.start >= self.end or self.size < 0:
            raise ValueError(f"a buffer of {self.size} bytes in [{self.start}, {self.end}) is none")

    @property
    def area(self) -> int:
        return self.size * (self.end - self.start)


def peak_bytes(buffers: Iterable[Buffer]) -> int:
    """The most bytes that are in use at one step: no arena is smaller."""
    changes: dict[int, int] = {}
    for buffer in buffers:
        changes[buffer.start] = changes.get(buffer.start, 0) + buffer.size
        changes[buffer.end] = changes.get(buffer.end, 0) - buffer.size
    live = peak = 0
    for step in sorted(changes):
        live += changes[step]
        peak = max(peak, live)
    return peak


def arena_bytes(buffers: Sequence[Buffer], offsets: Sequence[int]) -> int:
    """The size of an arena that holds them at these places."""
    return max((o + b.size for b, o in zip(buffers, offsets, strict=True)), default=0)


def fault(buffers: Sequence[Buffer], offsets: Sequence[int], capacity: int) -> str:
    """What is wrong with these places in an arena of `capacity` bytes, in a sentence; "" where nothing is.

    It sweeps over the steps and looks at the neighbours of what comes to life. It shares no line with what
    finds places.
    """
    if len(offsets) != len(buffers):
        return f"{len(buffers)} buffers have {len(offsets)} places"
    events = []
    for index, buffer in enumerate(buffers):
        if offsets[index] < 0 or offsets[index] + buffer.size > capacity:
            return f"buffer {index} at {offsets[index]} leaves an arena of {capacity} bytes"
        if buffer.size:
            events += [(buffer.end, 0, index), (buffer.start, 1, index)]  # what ends, ends first
    live: list[tuple[int, int]] = []
    for _, begins, index in sorted(events):
        place = (offsets[index], index)
        if not begins:
            live.remove(place)
            continue
        at = bisect(live, place)
        for offset, other in live[max(0, at - 1) : at + 1]:
            if offset < place[0] + buffers[index].size and place[0] < offset + buffers[other].size:
                return f"buffers {min(index, other)} and {max(index, other)} lie over each other"
        insort(live, place)
    return ""
