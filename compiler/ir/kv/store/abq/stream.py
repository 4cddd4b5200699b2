"""Accurate Block Quantization as kernels read it."""

from __future__ import annotations

from ...codes.block_float import BIAS
from ...codes.terms import code_term
from ...streams import AT, Source, Stream
from ..storage import GroupShape
from .storage import Abq


def streams(storage: Abq, shape: GroupShape) -> dict[str, Stream]:
    made = Stream(storage.granule)
    made.key, made.value = (_times_power(storage, made, part, bits) for part, bits in storage.parts)
    return {"": made}


def _times_power(storage: Abq, stream: Stream, part: str, bits: int) -> str:
    """A mantissa times two to the exponent of its block."""
    code, name, at = code_term(stream, part, part, bits, False), f"{part}_exponent", AT[part]
    exponent = stream.add(Source(name, name, at, ((at[3], storage.block),)))
    return f"({code} - {float(2 ** (bits - 1))}) * 2.0 ** ({exponent} - {float(BIAS)})"
