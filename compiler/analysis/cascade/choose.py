"""Which rank of a cascade to stream."""

from __future__ import annotations

from collections.abc import Mapping

from ...ir.cascade.cascade import Cascade
from .passes import count_passes


def choose_rank(cascade: Cascade, sizes: Mapping[str, int]) -> str:
    """The reduced rank that takes most passes as written, of several the longest; "" where none is reduced.

    The longest, because the others fit on the chip.
    """
    reduced = dict.fromkeys(rank for item in cascade.statements for rank in item.over)
    return max(
        reduced, key=lambda rank: (count_passes(cascade, rank), sizes.get(rank, 0)), default=""
    )
