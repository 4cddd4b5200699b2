"""How many times a cascade must stream a rank, as it is written.

Source: FuseMax, section 4 (passes): a statement that touches rank R belongs to the latest pass of what
it reads along R, and to the pass after every completed reduction over R that it uses. N passes mean N
streams over R, or values kept along all of R, whatever the mapping.
"""

from __future__ import annotations

from ...ir.cascade.cascade import Cascade, Statement
from ...ir.cascade.expr import ranks_of, reads


def count_passes(cascade: Cascade, rank: str) -> int:
    """The passes over `rank`; 0 where nothing touches it."""
    return max(passes_by_statement(cascade, rank).values(), default=0)


def passes_by_statement(cascade: Cascade, rank: str) -> dict[str, int]:
    """Of each statement that touches or follows from `rank`, the pass that it belongs to.

    The results of an iterative rank are completed where they are read at its end.
    """
    passes: dict[str, int] = {}
    for item in cascade.statements:
        along = touches(item, rank)
        found = int(along)
        for read in reads(item.expr):
            source = cascade.of(read.tensor)
            if source is None:
                continue
            behind = passes.get(read.tensor, 0)
            completed = along and behind > 0 and rank not in read.ranks
            found = max(found, behind + completed)
        passes[item.name] = max(found, passes.get(item.name, 0))
    return {name: count for name, count in passes.items() if count}


def touches(item: Statement, rank: str) -> bool:
    """Whether a statement is computed at points of a rank."""
    return rank in (ranks_of(item.expr) | set(item.over) | set(item.ranks))
