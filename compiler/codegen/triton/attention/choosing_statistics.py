"""Source of what the kernels that choose pages have of each reader: what its `statistic.py` says in torch.

Of `refresh`: `begun` before a page's keys, `taken` of some of them, `key` f32 [SLOTS, lanes], 0 in lanes that
are not `live`, and `stored` at `to`. Of `upper`: `loaded`, of pages from `start` on where `there`, and
`found`, their products with `q` f32 [lanes].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ....ir.kv.read.pages.paged import Paged
from ....ir.kv.read.quest.reader import Quest
from ....ir.kv.read.shadowkv.numbers import FARTHEST, TINY
from ....ir.kv.read.shadowkv.reader import ShadowKV
from .choosing_kinds import ChoosingKind


@dataclass(frozen=True)
class StatisticText:
    """One reader's, in lines of Triton."""

    begun: str
    taken: str
    stored: str
    loaded: str
    found: str


def _bounds(kind: ChoosingKind, reader: Paged) -> StatisticText:
    """The largest numbers, then the smallest; or what is between them."""
    assert isinstance(reader, Quest)
    size, lanes = kind.key_size, kind.lanes
    text = StatisticText(
        begun=f"""
largest = tl.full([{lanes}], float("-inf"), tl.float32)
smallest = tl.full([{lanes}], float("inf"), tl.float32)
""",
        taken="""
largest = tl.maximum(largest, tl.max(key, 0))
smallest = tl.minimum(smallest, tl.min(key, 0))
""",
        stored=f"""
tl.store(to, largest.to(bounds.dtype.element_ty), mask=live)
tl.store(to + {size}, smallest.to(bounds.dtype.element_ty), mask=live)
""",
        loaded=f"""
largest = tl.load(start, mask=there, other=0).to(tl.float32)
smallest = tl.load(start + {size}, mask=there, other=0).to(tl.float32)
""",
        found=f"""
half = q * 0.5
away = tl.abs(q * {reader.spread / 2!r})
found = tl.sum((half + away)[None, :] * largest + (half - away)[None, :] * smallest, 1)
""",
    )
    return _between(kind, reader, text) if reader.linear else text


def _between(kind: ChoosingKind, reader: Quest, bounds: StatisticText) -> StatisticText:
    """One number between the largest and the smallest."""
    share, rest = reader.linear, 1 - reader.linear
    return replace(
        bounds,
        stored=f"""
between = largest * {share!r} + smallest * {rest!r}
tl.store(to, {_whole(kind).format("between")}.to(bounds.dtype.element_ty), mask=live)
""",
        loaded="""
between = tl.load(start, mask=there, other=0).to(tl.float32)
""",
        found="""
found = tl.sum(q[None, :] * between, 1)
""",
    )


def _whole(kind: ChoosingKind) -> str:
    """How a statistic is stored: rounded where keys are codes."""
    return "tl.floor({} + 0.5)" if kind.bounds == "i8" else "{}"


def _landmarks(kind: ChoosingKind, reader: Paged) -> StatisticText:
    """The mean, then how far its keys are apart."""
    assert isinstance(reader, ShadowKV)
    size, whole = kind.key_size, _whole(kind)
    return StatisticText(
        begun=f"""
total = tl.zeros([{kind.lanes}], tl.float32)
squares = tl.zeros([{kind.lanes}], tl.float32)
""",
        taken="""
total += tl.sum(key, 0)
squares += tl.sum(key * key, 0)
""",
        stored=f"""
mean = total * {1 / reader.page!r}
length = tl.maximum(tl.sum(squares, 0) * {1 / reader.page!r}, {TINY!r})
apart = (1.0 - tl.sum(mean * mean, 0) / length) * {FARTHEST!r}
tl.store(to, {whole.format("mean")}.to(bounds.dtype.element_ty), mask=live)
tl.store(to + {size}, {whole.format("apart")}.to(bounds.dtype.element_ty), mask=d == 0)
""",
        loaded="""
landmark = tl.load(start, mask=there, other=0).to(tl.float32)
""",
        found="""
found = tl.sum(q[None, :] * landmark, 1)
""",
    )


def statistic_text(kind: ChoosingKind) -> StatisticText:
    """That of a kind's reader."""
    return {Quest: _bounds, ShadowKV: _landmarks}[type(kind.paged)](kind, kind.paged)
