"""How many units of each super-op come in every step, where the other units of it may stay.

    room      | stays of 1 | stays of 2 | stays of 3 | stays of 4 |  the most that comes of one | beside |
    comes     |    ####    |    ####    |     ##     |    ####    |  a level, and less where there is less

A step reads every weight once, so of two units it is as good to keep the one as the other, and what counts is
how many stay. Beside them there is room for the most that comes of one super-op, which runs, and for what is
read meanwhile: some units, or as much again, AHEAD super-ops in all. So for a sum of what comes the room is
least where as much comes of each. Whole super-ops, as a cache of layers would hold them, need room for two of
them whatever stays.

Of super-ops that a token reads in part (onnxruntime leaves sums out) a unit costs fewer bytes to bring:
what costs least comes first, up to the level. For each level that is the best there is (a fractional
knapsack whose items weigh one unit each), and the bytes are a convex function of the level, so that the best
level is found by halving.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

#: Super-ops that there is room for, with the one that runs, unless less is planned beside it.
AHEAD = 2


@dataclass(frozen=True)
class Units:
    """What is placed of a super-op."""

    count: int
    cost: float
    """Bytes that a step of one token reads for a unit that comes, on average."""


def come(
    every: Sequence[Units], room: int, window: int = 0, ahead: int = AHEAD
) -> list[int] | None:
    """Units that come of each super-op in a step, so that it reads the fewest bytes; None where nothing fits.

    `room` are the units that memory holds, with `ahead` times the most that comes of one super-op, or
    `window` units where that is more. The work is that of sorting, and of a pass for each halving of the
    largest count.
    """
    order = sorted(every, key=lambda units: units.cost)
    total = sum(units.count for units in every)
    if total + ahead * window <= room:
        return [0] * len(every)

    def needed(level: int) -> int:
        """Units that must come for the others to have room beside the window."""
        return max(total + ahead * level - room, 0)

    def lacks(level: int) -> bool:
        """Whether there are not so many below the level."""
        return sum(min(units.count, level) for units in every) < needed(level)

    def nbytes(level: int) -> float:
        left, found = needed(level), 0.0
        for units in order:
            count = min(units.count, level, left)
            found, left = found + count * units.cost, left - count
        return found

    top = least_level(every, window, ahead)
    if lacks(top):
        return None
    most = max((units.count for units in every), default=0)
    first = window + bisect_left(range(window, top), True, key=lambda level: not lacks(level))
    last = top + bisect_left(range(top + 1, most + 1), True, key=lacks)
    levels = range(first, last)
    best = bisect_left(levels, True, key=lambda level: nbytes(level) <= nbytes(level + 1))
    return _at(every, needed(first + best), first + best)


def least_level(every: Sequence[Units], window: int = 0, ahead: int = AHEAD) -> int:
    """The level that takes the least room: above it no more than `ahead` have more."""
    counts = sorted((units.count for units in every), reverse=True)
    return max(window, counts[ahead] if len(counts) > ahead else 0)


def in_proportion(every: Sequence[Units], room: int, ahead: int = AHEAD) -> list[int] | None:
    """The same where as large a part comes of each as of the others: for each, reading takes as many times as
    long as computing, so that little waits where both take about as long."""
    most = max((units.count for units in every), default=0)

    def counts(level: int) -> list[int]:
        return [-(-units.count * level // most) for units in every]

    def fits(level: int) -> bool:
        found = counts(level)
        return sum(u.count - n for u, n in zip(every, found, strict=True)) + ahead * level <= room

    level = bisect_left(range(most + 1), True, key=fits)
    return counts(level) if most and level <= most else None


def _at(every: Sequence[Units], left: int, level: int) -> list[int]:
    """So many units by a level: of what costs least all below it, of the next as much of each as is left."""
    counts = [0] * len(every)
    order = sorted(range(len(every)), key=lambda n: every[n].cost)
    for _, same in groupby(order, key=lambda n: every[n].cost):
        places = list(same)
        most = [min(every[n].count, level) for n in places]
        if sum(most) > left:
            most = _even(most, left)
        for n, count in zip(places, most, strict=True):
            counts[n] = count
        left -= sum(most)
    return counts


def _even(most: Sequence[int], total: int) -> list[int]:
    """`total` units, fewer than `most` together, as many of each as of the others where there are so many,
    and those that are left spread over the order."""
    level = bisect_left(
        range(max(most)), True, key=lambda n: sum(min(m, n + 1) for m in most) > total
    )
    counts = [min(m, level) for m in most]
    more = [n for n, m in enumerate(most) if m > level]
    left = total - sum(counts)
    for index in range(left):  # the last of each stretch, so that something runs before the first
        counts[more[(index + 1) * len(more) // left - 1]] += 1
    return counts
