"""KIVI as kernels read it."""

from __future__ import annotations

from ...codes.terms import code_terms
from ...streams import Stream
from ..storage import GroupShape
from .storage import Kivi


def streams(storage: Kivi, shape: GroupShape) -> dict[str, Stream]:
    return {"": stream(storage)}


def stream(storage: Kivi) -> Stream:
    """Codes of keys and values."""
    made, by_channel = Stream(storage.granule), storage.keys == "channel"
    made.key = code_terms(made, "key", "key", storage.key_bits, storage.group, by_channel)
    made.value = code_terms(made, "value", "value", storage.value_bits, storage.group, False)
    return made
