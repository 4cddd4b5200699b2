"""Packing without a search: one buffer after another, at the lowest place that is free while it lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .buffers import Buffer

#: In which order buffers are placed. Largest first is what mostly reaches the bound on a model's graph.
ORDERS: tuple[Callable[[Buffer], tuple[int, ...]], ...] = (
    lambda buffer: (-buffer.size, buffer.start),
    lambda buffer: (-buffer.area, buffer.start),
    lambda buffer: (buffer.start - buffer.end, -buffer.size),
    lambda buffer: (buffer.start, -buffer.size),
)


def first_fits(buffers: Sequence[Buffer]) -> Iterator[list[int]]:
    """Places for the buffers, for one order after another."""
    for order in ORDERS:
        ranked = sorted(range(len(buffers)), key=lambda index: order(buffers[index]))
        yield _place(buffers, ranked)


def _place(buffers: Sequence[Buffer], ranked: Sequence[int]) -> list[int]:
    starts, ends, sizes = (
        np.array([getattr(buffers[index], name) for index in ranked], np.int64)
        for name in ("start", "end", "size")
    )
    offsets = np.zeros(len(ranked), np.int64)
    for at in range(len(ranked)):
        meets = np.flatnonzero((starts[:at] < ends[at]) & (starts[at] < ends[:at]))
        free = 0
        for other in meets[np.argsort(offsets[meets])]:
            if offsets[other] - free >= sizes[at]:
                break
            free = max(free, offsets[other] + sizes[other])
        offsets[at] = free
    found = dict(zip(ranked, offsets.tolist(), strict=True))
    return [found[index] for index in range(len(buffers))]
