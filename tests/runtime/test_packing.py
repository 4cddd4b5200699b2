"""Tokens that leave the slots of a packed group: what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from einfold.compiler.ir.kv.layout import CacheLayout, HeadGroup, LayerCache
from einfold.compiler.ir.kv.store.kivi.storage import Kivi
from einfold.compiler.ir.kv.store.minicache.storage import MiniCache
from einfold.compiler.ir.kv.store.packed import Packed
from einfold.errors import ModelError
from einfold.runtime.cache import Cache


def layout(storage: Packed) -> CacheLayout:
    """Two layers; the second shares with the first where the storage wants a pair."""
    partner = 0 if storage.shared else None
    owns = LayerCache(0, 1, 8, 8, (HeadGroup((0,), storage=storage),))
    other = LayerCache(1, 1, 8, 8, (HeadGroup((0,), storage=storage, partner=partner),))
    return CacheLayout((owns, other))


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("kind", [Kivi, MiniCache])
@pytest.mark.parametrize(("part", "number"), [("key", np.nan), ("value", np.inf)])
def test_numbers_that_are_not_finite_are_not_packed(
    kind: type[Packed], prefill: str, part: str, number: float
) -> None:
    storage = kind(residual=8, slack=1, prefill=prefill, group=8)  # type: ignore[call-arg]
    tokens = 24 if prefill == "exact" else 16  # 16 are all that a group has slots for afterwards
    cache = Cache.allocate(layout(storage), 1, 40, tokens)
    cache.buffers[f"cache.1.0.{part}"][0, 0, 3, 5] = number
    cache.advance(tokens)
    with pytest.raises(ModelError, match=rf"the {part}s of layer 1 are not finite"):
        cache.settle() if prefill == "exact" else cache.make_room(1)
