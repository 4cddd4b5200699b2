"""TurboQuant as kernels read it."""

from __future__ import annotations

from ...codes.normal import level_term
from ...codes.terms import code_term
from ...streams import AT, Source, Stream
from ..storage import GroupShape
from .storage import TurboQuant


def streams(storage: TurboQuant, shape: GroupShape) -> dict[str, Stream]:
    made = Stream(storage.granule)
    mean = made.add(Source("key_mean", "key_mean", AT["key"], (("t", storage.group),), "row", 0))
    made.key = f"{_scaled(made, 'key', storage.key_bits)} + {mean}"
    made.value = _scaled(made, "value", storage.value_bits)
    return {"": made}


def _scaled(stream: Stream, part: str, bits: int) -> str:
    """A code's level times its token's scale."""
    level = level_term(code_term(stream, part, part, bits, by_channel=False), bits)
    scale = stream.add(Source(f"{part}_scale", f"{part}_scale", AT[part][:3], (), "token", 0))
    return f"{level} * {scale}"
