"""Tokens that leave the slots of a packed group: which do, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from einfold.compiler.ir.kv.codes.codec import decode
from einfold.compiler.ir.kv.layout import CacheLayout, HeadGroup, LayerCache
from einfold.compiler.ir.kv.store.kivi.storage import Kivi
from einfold.compiler.ir.kv.store.minicache.storage import MiniCache
from einfold.compiler.ir.kv.store.packed import Packed
from einfold.compiler.ir.kv.store.storage import GroupShape
from einfold.compiler.ir.kv.store.turboquant.storage import TurboQuant
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
    storage = kind(residual=8, slack=1, prefill=prefill, sinks=0, group=8)  # type: ignore[call-arg]
    tokens = 24 if prefill == "exact" else 16  # 16 are all that a group has slots for afterwards
    cache = Cache.allocate(layout(storage), 1, 40, tokens)
    cache.buffers[f"cache.1.0.{part}"][0, 0, 3, 5] = number
    cache.advance(tokens)
    with pytest.raises(ModelError, match=rf"the {part}s of layer 1 are not finite"):
        cache.settle() if prefill == "exact" else cache.make_room(1)


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("kind", [Kivi, TurboQuant])
def test_first_and_newest_tokens_stay_as_they_are(kind: type[Packed], prefill: str) -> None:
    storage = kind(residual=8, slack=8, prefill=prefill, sinks=3, group=8, bits=8)  # type: ignore[call-arg]
    group = HeadGroup((0,), storage=storage)
    cache = Cache.allocate(CacheLayout((LayerCache(1, 1, 8, 8, (group,)),)), 1, 60, 40)
    text = np.random.default_rng(0).standard_normal((2, 1, 60, 8)).astype(np.float32)
    for seen in range(0, 60, 5):
        if seen == 40:
            cache.settle()
        cache.make_room(5)
        used = int(cache.clocks["slots.0"][0])
        for part, tokens in zip(("key", "value"), text, strict=True):
            cache.buffers[f"cache.1.0.{part}"][0, :, used : used + 5] = tokens[:, seen : seen + 5]
        cache.advance(5)
    packed, used = int(cache.packed["packed.0"][0]), int(cache.clocks["slots.0"][0])
    assert packed >= 32 and packed + used == 60
    shape = GroupShape(1, 8, 8)
    names = [piece.name for piece in storage.pieces(shape)]
    pieces = {n: torch.from_numpy(cache.buffers[f"cache.1.0.{n}"][0]) for n in names}
    for part, tokens, bulk in zip(("key", "value"), text, decode(storage, pieces), strict=True):
        slots = cache.buffers[f"cache.1.0.{part}"][0]
        np.testing.assert_array_equal(slots[:, :3], tokens[:, :3])
        np.testing.assert_array_equal(slots[:, 3:used], tokens[:, 3 + packed :])
        kept = bulk.flatten(1, 2).numpy()[:, :packed]
        np.testing.assert_allclose(kept, tokens[:, 3 : 3 + packed], atol=0.1)
