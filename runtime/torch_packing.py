"""Packing in torch: what a storage makes of tokens that leave the slots, see `packing.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compiler.ir.kv.codes.codec import Seen, encode
from ..compiler.ir.kv.layout import PARTS, LayerCache, cache_name
from ..compiler.ir.kv.store.packed import Packed
from .buffers import CacheBuffers


def pack_slots(
    cache: CacheBuffers,
    layer: LayerCache,
    index: int,
    row: int,
    used: int,
    slots: slice,
    first: int,
) -> None:
    """Encodes some of a row's `used` slots behind the `first` granules of its bulk."""
    storage = _packed(layer, index)
    if storage.shared:
        _pack_pair(cache, layer, index, row, slots, first)
        return
    prefix = cache_name(layer.layer, index)
    keys_KTD, values_KTD = _leaving(cache, layer, index, row, slots)
    seen = _seen(cache, prefix, row, used, slots)
    _store(cache, prefix, row, first, encode(storage, keys_KTD, values_KTD, seen))


def _packed(layer: LayerCache, index: int) -> Packed:
    storage = layer.groups[index].storage
    assert isinstance(storage, Packed)
    return storage


def _pack_pair(
    cache: CacheBuffers, layer: LayerCache, index: int, row: int, slots: slice, first: int
) -> None:
    storage, prefix = _packed(layer, index), cache_name(layer.layer, index)
    follower = cache.layout.follower(layer, index)
    assert follower is not None  # the layout has checked it
    other = cache_name(follower.layer, index)
    both = (_leaving(cache, entry, index, row, slots) for entry in (layer, follower))
    pair = zip(*both, strict=True)
    cut = [tuple(x.float().unflatten(1, (-1, storage.granule)) for x in two) for two in pair]
    for name, pieces in zip((prefix, other), storage.codec.encode_pair(storage, *cut), strict=True):
        _store(cache, name, row, first, pieces)


def _leaving(
    cache: CacheBuffers, layer: LayerCache, index: int, row: int, slots: slice
) -> list[Tensor]:
    """Keys and values [K, leaving, D] of the tokens that leave."""
    prefix = cache_name(layer.layer, index)
    return [_tensor(cache.buffers[f"{prefix}.{part}"][row])[:, slots] for part in PARTS]


def _store(
    cache: CacheBuffers, prefix: str, row: int, first: int, pieces: dict[str, Tensor]
) -> None:
    """Writes pieces behind the `first` granules of a row's bulk."""
    for name, pieces_KGRW in pieces.items():
        bulk_KGRW = _tensor(cache.buffers[f"{prefix}.{name}"][row])
        bulk_KGRW[:, first : first + pieces_KGRW.shape[1]] = pieces_KGRW


def _seen(cache: CacheBuffers, prefix: str, row: int, used: int, slots: slice) -> Seen:
    """What is known of how the leaving tokens were attended to."""
    score, largest = cache.buffers.get(f"{prefix}.score"), cache.buffers.get(f"{prefix}.query_max")
    return Seen(
        None if score is None else _tensor(score[row])[:, slots],
        # A token sees itself, and every later query sees it.
        torch.arange(used - slots.start, used - slots.stop, -1),
        None if largest is None else _tensor(largest[row]),
    )


def _tensor(buffer: Any) -> Tensor:
    """A buffer as a tensor that shares its memory."""
    return buffer if isinstance(buffer, Tensor) else torch.from_numpy(buffer)
