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
    made.key = f"{_scaled(storage, made, 'key')} + {mean}"
    made.value = _scaled(storage, made, "value")
    return {"": made}


def _scaled(storage: TurboQuant, stream: Stream, part: str) -> str:
    """A code's level times its token's scale."""
    bits = storage.key_bits if part == "key" else storage.value_bits
    code = code_term(stream, part, part, bits, by_channel=False)
    level = f"({code} - {(2**bits - 1) / 2})" if storage.even else level_term(code, bits)
    scale = stream.add(Source(f"{part}_scale", f"{part}_scale", AT[part][:3], (), "token", 0))
    return f"{level} * {scale}"
