"""Packing without a search: one buffer after another, at the lowest place that is free while it lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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
    offsets = [0] * len(buffers)
    placed: list[int] = []
    for index in ranked:
        buffer = buffers[index]
        taken = sorted(
            (offsets[other], buffers[other].size)
            for other in placed
            if buffer.meets(buffers[other])
        )
        at = 0
        for offset, size in taken:
            if offset - at >= buffer.size:
                break
            at = max(at, offset + size)
        offsets[index] = at
        placed.append(index)
    return offsets
