"""Shares of tokens as counts."""

from __future__ import annotations

from ...ir.cache.packing import CODES


def salient_tokens(share: float, tokens: int) -> int:
    """The salient tokens of a granule: a share of it, to the nearest multiple of 8, as codes are packed."""
    return CODES * round(share * tokens / CODES)
