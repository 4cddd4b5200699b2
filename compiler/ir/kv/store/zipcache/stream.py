"""ZipCache as kernels read it."""

from __future__ import annotations

from ...codes.terms import code_terms
from ...streams import AT, Source, Stream
from ..storage import GroupShape
from .storage import ZipCache


def streams(storage: ZipCache, shape: GroupShape) -> dict[str, Stream]:
    found = {}
    for part, tokens, bits in storage.parts:
        made = found[part] = Stream(tokens)
        made.key = code_terms(made, "key", f"{part}_key", bits, tokens, True)
        value = code_terms(made, "value", f"{part}_value", bits, shape.value_size, False)
        norm = made.add(Source("value_norm", "value_norm", AT["value"], (("t", tokens),)))
        made.value = f"({value}) * {norm}"
    return found
