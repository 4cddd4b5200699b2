"""A memory plan as a picture: time across, address up. Needs no torch: reports are read without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

#: Of a picture, in pixels.
WIDTH, HEIGHT = 960, 240

#: What buffers are filled with, one after the other.
_FILLS = ("#54aeff", "#4ac26b", "#d4a72c", "#ff8182", "#c297ff", "#8c959f")


def picture(plan: Mapping[str, Any]) -> str:
    """A plan (`MemoryPlan.data`) as an SVG element."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#f6f8fa"/>{"".join(_boxes(plan))}</svg>'
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
