"""Packing: tokens that leave the slots of a packed group go into its bulk buffers."""

from __future__ import annotations

import numpy as np

from ..compiler.ir.kv.layout import PARTS, LayerCache, cache_name, packed_of
from ..compiler.ir.kv.store.packed import Packed
from ..errors import ModelError
from .buffers import CacheBuffers

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
    follower = cache.layout.follower(layer, index) if storage.shared else None
    for start in range(0, leaving, tile):
        slots = slice(lead + start, lead + min(start + tile, leaving))
        first = (packed + start) // storage.granule
        for each in (layer, follower) if follower is not None else (layer,):
            _check_finite(cache, each, index, row, slots)
        if in_numpy:
            tokens = [cache.buffers[f"{prefix}.{part}"][row][:, slots] for part in PARTS]
            for name, pieces_KGRW in storage.arrays.encode(storage, *tokens).items():
                bulk_KGRW = cache.buffers[f"{prefix}.{name}"][row]
                bulk_KGRW[:, first : first + pieces_KGRW.shape[1]] = pieces_KGRW
        else:
            from .torch_packing import pack_slots  # torch, which running may not need

            pack_slots(cache, layer, index, row, used, slots, first)


def _check_finite(
    cache: CacheBuffers, layer: LayerCache, index: int, row: int, slots: slice
) -> None:
    """Raises ModelError where a key or a value that is packed is no number; arrays may be torch's."""
    for part in PARTS:
        leaving_KTD = cache.buffers[f"{cache_name(layer.layer, index)}.{part}"][row][:, slots]
        if not bool((abs(leaving_KTD) < float("inf")).all()):
            raise ModelError(
                f"the {part}s of layer {layer.layer} are not finite, so they cannot be packed: the model's "
                "weights are damaged, or overflow in float32; load and compile them again"
            )
