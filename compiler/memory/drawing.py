"""Plans of memory as pictures, with time across: of an arena with addresses up, of weights that are read from
the disk with a lane for each side. Needs no torch: reports are read without."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

from .timeline import Bar, Timeline

#: Of a picture, in pixels.
WIDTH, HEIGHT = 960, 240

#: What buffers are filled with, one after the other.
_FILLS = ("#54aeff", "#4ac26b", "#d4a72c", "#ff8182", "#c297ff", "#8c959f")

#: What a side is filled with while it waits, and pixels of a lane and from one to the next.
_WAITS, _LANE, _NEXT = "#d8dee4", 96, 120

#: What a side waits for, and what it does, in words.
_WORDS = {"read": "is read", "pack": "is packed", "compute": "is computed"}


def picture(plan: Mapping[str, Any]) -> str:
    """A plan (`MemoryPlan.data`) as an SVG element."""
    return _svg(_boxes(plan))


def timeline_picture(timeline: Timeline) -> str:
    """A step as an SVG element: above what the disk reads, below what the engine packs and computes. A
    super-op has the same colour in both."""
    lanes = (timeline.disk, 0, "room to read"), (timeline.engine, _NEXT, "weights of")
    return _svg(
        box for bars, top, what in lanes for bar in bars for box in _bar(bar, top, what, timeline)
    )


def _svg(boxes: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#f6f8fa"/>{"".join(boxes)}</svg>'
    )


def _bar(bar: Bar, top: int, awaited: str, timeline: Timeline) -> Iterator[str]:
    across = WIDTH / timeline.seconds
    waits = bar.kind == "wait"
    what = f"waits for {awaited} {bar.name}" if waits else f"{bar.name} {_WORDS[bar.kind]}"
    title = f"{what}: {1e3 * (bar.end - bar.start):,.2f} ms from {1e3 * bar.start:,.2f} on"
    # What is packed and what is computed of a super-op lie in one lane: packing is the lower one.
    height = _LANE / 2 if waits or bar.kind == "pack" else _LANE
    yield (
        f'<rect x="{bar.start * across:.1f}" y="{12 + top + _LANE - height:.1f}" '
        f'width="{(bar.end - bar.start) * across:.1f}" height="{height:.1f}" '
        f'fill="{_WAITS if waits else _FILLS[bar.index % len(_FILLS)]}" stroke="#fff" stroke-width=".5">'
        f"<title>{escape(title)}</title></rect>"
    )


def _boxes(plan: Mapping[str, Any]) -> Iterator[str]:
    across, up = WIDTH / plan["calls"], HEIGHT / max(1, plan["arena"])
    for index, (name, start, end, offset, size) in enumerate(plan["buffers"]):
        title = f"{name}: {size:,} bytes at {offset:,}, calls {start} to {end - 1}"
        yield (
            f'<rect x="{start * across:.1f}" y="{HEIGHT - (offset + size) * up:.1f}" '
            f'width="{(end - start) * across:.1f}" height="{size * up:.1f}" '
            f'fill="{_FILLS[index % len(_FILLS)]}" stroke="#fff" stroke-width=".5">'
            f"<title>{escape(title)}</title></rect>"
        )
