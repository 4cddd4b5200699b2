"""MiKV as kernels read it."""

from __future__ import annotations

from ...codes.terms import code_terms
from ...streams import AT, Source, Stream
from ..storage import GroupShape
from .storage import MiKV


def streams(storage: MiKV, shape: GroupShape) -> dict[str, Stream]:
    found = {}
    for part, tokens, bits in storage.parts:
        made = found[part] = Stream(tokens)
        key = code_terms(made, "key", f"{part}_key", bits, storage.group, False)
        made.value = code_terms(made, "value", f"{part}_value", bits, storage.group, False)
        balance = made.add(Source("key_balance", "key_balance", AT["key"], (("t", tokens),)))
        # Where a tile is wider than the head it loads zeros; no balance is that small.
        made.key = f"({key}) / max({balance}, 0.0001)"
    return found
