"""Places for buffers in one arena, as small as can be found: first fit, then a search."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import IRError
from .buffers import Buffer, arena_bytes, fault, peak_bytes
from .first_fit import first_fits

#: Seconds of processors that a search may take where the caller names none.
SECONDS = 8.0

#: The orders in which the search places buffers, by keys one behind the other: the most that lives beside
#: them (T), how long they live (W), their area (A), how many they meet (O), in how many sections (C).
#: The first three are SuperMalloc's own; the others find in milliseconds what these do not in seconds.
_ORDERS = ("TWA", "WAT", "TAW", "OTA", "CTA", "WTA")

#: Nodes that it visits at first in each order, by how much more when it begins again, and about how many it
#: visits in a second.
_NODES, _GROWTH, _RATE = 1000, 4, 40_000

#: Arenas that differ by less than one part in so many are not told apart before the search begins again.
_FINEST = 200


@dataclass(frozen=True)
class Plan:
    """Where each buffer lies."""

    offsets: tuple[int, ...]
    arena: int
    """Bytes of the arena."""
    bound: int
    """The most live bytes of any step: no arena is smaller."""
    optimal: bool
    """Whether it is proved that no arena is smaller than this one."""


def pack(buffers: Sequence[Buffer], capacity: int | None = None, seconds: float = SECONDS) -> Plan:
    """Packs buffers into an arena that is as small as it finds within so many seconds of processors.

    With a capacity it ends as soon as they fit into that; whether they do, the caller sees by `arena`. Orders
    of first fit come first: on graphs of models one of them mostly reaches the bound, which ends it too.
    """
    started = time.process_time()
    bound = peak_bytes(buffers)
    goal = max(bound, capacity or 0)
    best = Plan((), 0, bound, True)
    for found in first_fits(buffers):
        arena = arena_bytes(buffers, found)
        if not best.offsets or arena < best.arena:
            best = Plan(tuple(found), arena, bound, arena == bound)
        if best.arena <= goal:
            break
    if best.arena > goal:
        search = _Search(buffers, bound, started + seconds)
        best = search.smaller(best, goal) if capacity is None else search.within(best, goal)
    if wrong := fault(buffers, best.offsets, best.arena):
        raise IRError(f"what was packed does not hold: {wrong}")
    return best


class _Search:
    """The branch and bound of omnimalloc's SuperMalloc, by the time `until` of the processors.

    Its allocator goes down from the best that it has, and a search in an arena that is too wide is long. Here
    it is asked for the arena that is wanted and nothing else, in one order after the other, each with few
    nodes at first. So what is found does not depend on how busy the machine is, but for when it ends.
    """

    def __init__(self, buffers: Sequence[Buffer], bound: int, until: float) -> None:
        from omnimalloc import Allocation
        from omnimalloc._cpp import Partition

        self._buffers, self._bound, self._until = buffers, bound, until
        asked = [
            Allocation(index, buffer.size, buffer.start, buffer.end)
            for index, buffer in enumerate(buffers)
            if buffer.size
        ]
        whole = Partition.from_allocations(asked)
        self._orders = [whole.reorder(order) for order in _ORDERS]

    def within(self, best: Plan, goal: int) -> Plan:
        """A plan in an arena of `goal` bytes or less, else `best`."""
        nodes = _NODES
        while self._left() > 0:
            found = self._ask(goal, nodes)
            if found is not None:
                return found
            if self._none_in(goal, nodes):
                break
            nodes *= _GROWTH
        return best

    def smaller(self, best: Plan, goal: int) -> Plan:
        """The smallest plan that it finds, of no less than `goal` bytes: that first, then halfway between
        what was not found and what was."""
        nodes, low, asked = _NODES, goal, goal
        while best.arena > goal and self._left() > 0:
            found = self._ask(asked, nodes)
            if found is not None:
                best = found
            else:
                low = asked
            asked = (low + best.arena) // 2
            if best.arena - asked <= best.arena // _FINEST:
                if self._none_in(best.arena - 1, nodes):
                    return replace(best, optimal=True)
                nodes, low, asked = nodes * _GROWTH, goal, goal
        return best

    def _left(self) -> float:
        return self._until - time.process_time()

    def _ask(self, goal: int, nodes: int) -> Plan | None:
        """A plan in an arena of `goal` bytes that some order finds within so many nodes."""
        for order in self._orders:
            found = self._solve(order, goal, nodes, self._left())
            if found is not None:
                offsets = [0] * len(self._buffers)
                for placed in found.allocations:
                    offsets[placed.id] = placed.offset
                arena = arena_bytes(self._buffers, offsets)
                return Plan(tuple(offsets), arena, self._bound, arena == self._bound)
        return None

    def _none_in(self, goal: int, nodes: int) -> bool:
        """Whether it is proved, in about the time of so many nodes, that nothing fits in `goal` bytes: a
        search without a limit came to its end."""
        started, seconds = time.monotonic(), min(nodes / _RATE, self._left())
        found = self._solve(self._orders[0], goal, None, seconds)
        return found is None and time.monotonic() - started < seconds

    def _solve(self, order: Any, goal: int, nodes: int | None, seconds: float) -> Any:
        from omnimalloc._cpp import try_solve_many

        return try_solve_many(
            [order.with_bound(goal + 1)],
            goal + 1,
            nodes,
            canonical=True,
            dominance=True,
            floor_inference=True,
            monotonic_floor=True,
            decompose=True,
            timeout=max(seconds, 0.0),
            num_threads=1,  # so that no more time of the processor passes than of the clock
        )
