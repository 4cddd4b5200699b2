"""Codes as kernels read them: how `grouped` lays them out, in the words of a cascade."""

from __future__ import annotations

from ..store.packed import PLANES, planes
from ..streams import AT, Source, Stream


def code_terms(
    stream: Stream, part: str, prefix: str, bits: int, group: int, by_channel: bool
) -> str:
    """Codes times their scale plus their zero, as an expression; adds what it reads to the stream.

    `part` is "key" or "value", `prefix` begins the pieces' names. A scale is for `group` tokens of a channel,
    or channels of a token.
    """
    at = AT[part]
    code = code_term(stream, part, prefix, bits, by_channel)
    shared = (("t" if by_channel else at[3], group),)
    scale, zero = (
        stream.add(Source(f"{prefix}_{name}", f"{prefix}_{name}", at, shared))
        for name in ("scale", "zero")
    )
    return f"{code} * {scale} + {zero}"


def code_term(stream: Stream, part: str, prefix: str, bits: int, by_channel: bool) -> str:
    """Codes as an expression, in parentheses where it is a sum; adds their planes to the stream."""
    at, lane = AT[part], AT[part][3]
    along = "t" if by_channel else lane
    terms = []
    for (name, width), (_, above) in zip(planes(prefix, bits), PLANES[bits], strict=True):
        each = 8 // width
        shared = ((along, each),) if each > 1 else ()
        code = stream.add(Source(name, name, at, shared))
        if each > 1:
            code = f"bits(shift_right({code}, (pos({along}) % {each}) * {width}), {2**width - 1})"
        terms.append(f"{code} * {2**above}" if above else code)
    return terms[0] if len(terms) == 1 else f"({' + '.join(terms)})"
