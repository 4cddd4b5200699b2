"""MiniCache as kernels read it.

One stream: of a token the key may be retained and the value merged, so no two sets of tokens part them.
"""

from __future__ import annotations

from ......errors import UnsupportedError
from ...streams import AT, Source, Stream
from ..storage import GroupShape
from .storage import MiniCache

#: Retained rows that a kernel reads, each as an input; 16 spill, and take a minute to compile.
RETAINED = 8


def streams(storage: MiniCache, shape: GroupShape) -> dict[str, Stream]:
    if storage.rows > RETAINED:
        raise UnsupportedError(
            f"up to {storage.rows} of {storage.group} tokens are retained, and a kernel reads up to "
            f"{RETAINED}; lower retained or group of cache.share, or compile for the target reference"
        )
    made = Stream(storage.granule)
    made.key, made.value = (_merged(made, storage, part) for part in ("key", "value"))
    return {"": made}


def _merged(stream: Stream, form: MiniCache, part: str) -> str:
    """A direction times its length, or the retained row whose place this is; -1 is the place of no token."""
    at, each = AT[part], (("t", form.group),)
    direction = stream.add(Source(f"{part}_direction", f"{part}_direction", at))
    length = stream.add(Source(f"{part}_length", f"{part}_length", at[:3], (), "token"))
    made = f"{direction} * {length}"
    for i in range(form.rows):
        place = stream.add(Source(f"{part}_place{i}", f"{part}_place", at[:3], each, "entry", i))
        kept = stream.add(Source(f"{part}_kept{i}", f"{part}_kept", at, each, "row", i))
        made = f"where({place} == pos(t) % {form.group}, {kept}, {made})"
    return made
