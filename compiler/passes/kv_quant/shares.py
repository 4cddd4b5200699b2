"""Shares of tokens as counts."""

from __future__ import annotations

from ....errors import IRError
from ...ir.kv.store.packed import CODES


def salient_tokens(share: float, tokens: int) -> int:
    """The salient tokens of a granule: a share of it, to the nearest multiple of 8, as codes are packed.

    Raises IRError for a share that is none.
    """
    if not 0 <= share <= 1:
        raise IRError(f"the share of salient tokens is from 0 to 1, not {share}")
    return CODES * round(share * tokens / CODES)
