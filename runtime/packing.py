"""Packing: tokens that leave the slots of a packed group go into its bulk buffers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiler.ir.kv.layout import PARTS, LayerCache, cache_name, packed_of
from ..compiler.ir.kv.store.packed import Packed, Pieces
from ..errors import ModelError
from .buffers import Array, CacheBuffers

#: Tokens of a row and group that are encoded together: bounds what encoding holds beside the cache.
TILE = 1024


def pack(
    cache: CacheBuffers, layer: LayerCache, index: int, row: int, used: int, leaving: int
) -> None:
    """Encodes the first `leaving` of a row's `used` slots behind what is packed already.

    Granules know nothing of each other, so a long prompt is encoded some of them at a time. Arrays that the
    storage packs in NumPy stay arrays; all others are packed in torch. Raises ModelError for keys or values
    that are not finite.
    """
    group, prefix = layer.groups[index], cache_name(layer.layer, index)
    storage, lead = group.storage, group.lead
    assert isinstance(storage, Packed)
    packed = int(cache.packed[packed_of(cache.layout.clock(group))][row])
    in_numpy = isinstance(cache.buffers[f"{prefix}.key"], np.ndarray) and storage.in_arrays
    tile = max(1, TILE // storage.granule) * storage.granule
    for start in range(0, leaving, tile):
        slots = slice(lead + start, lead + min(start + tile, leaving))
        first = (packed + start) // storage.granule
        if in_numpy:
            keys_KTD, values_KTD = _leaving(cache, layer, index, row, slots)
            _store(cache, prefix, row, first, storage.arrays.encode(storage, keys_KTD, values_KTD))
        else:
            from .torch_packing import pack_slots  # torch, which running may not need

            pack_slots(cache, layer, index, row, used, slots, first)


def _leaving(
    cache: CacheBuffers, layer: LayerCache, index: int, row: int, slots: slice
) -> list[Array]:
    prefix = cache_name(layer.layer, index)
    found = [cache.buffers[f"{prefix}.{part}"][row][:, slots] for part in PARTS]
    for part, x_KTD in zip(PARTS, found, strict=True):
        if not np.isfinite(x_KTD).all():
            raise not_finite(part, layer)
    return found


def _store(cache: CacheBuffers, prefix: str, row: int, first: int, pieces: Pieces) -> None:
    """Writes pieces behind the `first` granules of a row's bulk."""
    for name, pieces_KGRW in pieces.items():
        bulk_KGRW: Any = cache.buffers[f"{prefix}.{name}"][row]
        bulk_KGRW[:, first : first + pieces_KGRW.shape[1]] = pieces_KGRW


def not_finite(part: str, layer: LayerCache) -> ModelError:
    """What is raised for keys or values that are no numbers."""
    return ModelError(
        f"the {part}s of layer {layer.layer} are not finite, so they cannot be packed: the model's "
        "weights are damaged, or overflow in float32; load and compile them again"
    )
