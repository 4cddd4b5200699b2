"""Which super-ops stay whole, where they are packed in every step, or copied to a GPU, and no part can stay.

A knapsack with a window: what is not pinned comes into AHEAD buffers of the largest, and is packed there
unless it is ready, so the larger what is streamed, the less room is left. For every kind (super-ops of equal
sizes) of which the largest streamed one may be, a branch and bound looks for the most bytes to pin beside:
kind by kind, the largest first, as many as fit and then fewer. A branch ends where even bytes of the best
density that is left, in all the room that is left, would not do better. Models have few kinds, and the first
dive mostly is the best; where all sizes differ, a search ends after NODES.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .leveling import AHEAD

#: Packed super-ops that the process holds while one runs: that one, and as much that the C library has not
#: given back of those before (measured: up to half of the largest).
PACKED = 2

#: Choices that are tried, spread over the kinds of which the largest streamed one may be.
NODES = 40_000


@dataclass(frozen=True, order=True)
class Kind:
    """Bytes of a super-op in the file, and packed in memory."""

    nbytes: int
    held: int


#: How many of each kind are pinned.
Pinned = Mapping[Kind, int]


@dataclass(frozen=True)
class Window:
    """What memory takes beside buffers and what is pinned, by what is done with what comes."""

    packed: int
    """Times the packed bytes of the largest streamed super-op."""
    loading: int
    """Times the bytes of a pinned one while it is loaded behind those before it."""


#: Pinned weights that are packed are there three times meanwhile: as they were read, as the engine takes
#: them, and packed. What is ready goes from its buffer to where it is read.
PACKING, READY = Window(PACKED, 2), Window(0, 0)


def pin(every: Sequence[Kind], room: int, window: Window = PACKING) -> Pinned | None:
    """How many of each kind to pin so that the fewest bytes are streamed; None where nothing is found that
    `room` bytes hold."""
    kinds = dict(sorted(Counter(every).items(), reverse=True))
    best = _Best(kinds, room, window)
    best.offer(kinds)
    for kind, count in kinds.items():
        best.offer({**kinds, kind: count - 1})
    for first in range(len(kinds)):
        _search(best, first)
    return best.pinned


def least(every: Sequence[Kind], window: Window = PACKING) -> Pinned:
    """What to pin so that a step takes the least memory, or nearly: what is larger than a size."""
    kinds = dict(sorted(Counter(every).items(), reverse=True))

    def larger() -> Iterator[Pinned]:
        for limit in (Kind(0, 0), *kinds):
            yield {kind: count for kind, count in kinds.items() if kind.nbytes > limit.nbytes}
            yield {kind: count for kind, count in kinds.items() if kind.held > limit.held}

    return min(larger(), key=lambda pinned: needed(kinds, pinned, window))


def needed(kinds: Pinned, pinned: Pinned, window: Window = PACKING) -> int:
    """Bytes of memory, while a step runs or while what is pinned is loaded, one super-op after the other, of
    so many of each kind."""
    held = loading = 0
    for kind in sorted(kinds, reverse=True):
        if there := pinned.get(kind, 0):
            held += there * kind.held
            loading = max(loading, held + window.loading * kind.nbytes)
    streamed = {kind: count - pinned.get(kind, 0) for kind, count in kinds.items()}
    left = [kind for kind, count in streamed.items() if count]
    buffers = min(AHEAD, sum(streamed.values())) * max((kind.nbytes for kind in left), default=0)
    packed = window.packed * max((kind.held for kind in left), default=0)
    return max(held + buffers + packed, loading)


@dataclass
class _Best:
    """The best that was found so far."""

    kinds: Pinned
    room: int
    window: Window
    pinned: Pinned | None = None
    rank: tuple[int, int] = (-1, 0)
    """Bytes that are pinned, and memory that this takes, below 0."""

    def offer(self, pinned: Pinned) -> None:
        rank = (
            sum(kind.nbytes * n for kind, n in pinned.items()),
            -needed(self.kinds, pinned, self.window),
        )
        if -rank[1] <= self.room and rank > self.rank:
            self.pinned, self.rank = pinned, rank


def _search(best: _Best, first: int) -> None:
    """Tries ways to pin with the largest streamed super-op of one kind, and another streamed beside."""
    kinds = list(best.kinds.items())
    before, (largest, count) = kinds[:first], kinds[first]
    rest, density = [0], [0.0]
    for kind, each in reversed(kinds):
        rest.insert(0, rest[0] + each * kind.nbytes)
        density.insert(0, max(density[0], kind.nbytes / max(kind.held, 1)))
    window = AHEAD * largest.nbytes + best.window.packed * largest.held
    sure = sum(kind.nbytes * each for kind, each in before)
    held = sum(kind.held * each for kind, each in before)
    nodes = NODES // len(kinds)
    open_ = [_Node(first, dict(before), sure, held)]
    while open_ and nodes:
        node = open_.pop()
        if node.index == len(kinds):
            best.offer(node.pinned)
            continue
        nodes -= 1
        (kind, each), after = kinds[node.index], node.index + 1
        most = each - 1 if node.index == first else each
        for count in range(most + 1):  # the most of them are looked at first: they lie on top
            made = node.with_pinned(kind, count)
            room = best.room - window - made.held
            loads = not count or made.held + best.window.loading * kind.nbytes <= best.room
            hoped = made.sure + min(rest[after], int(max(room, 0) * density[after]))
            if room >= 0 and loads and hoped > best.rank[0]:
                open_.append(made)


@dataclass(frozen=True)
class _Node:
    """Kinds before `index` are decided."""

    index: int
    pinned: Pinned
    sure: int
    """Bytes of what is pinned, in the file, and in memory."""
    held: int

    def with_pinned(self, kind: Kind, count: int) -> _Node:
        return _Node(
            self.index + 1,
            {**self.pinned, kind: count},
            self.sure + count * kind.nbytes,
            self.held + count * kind.held,
        )
