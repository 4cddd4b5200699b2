"""Packing: tokens that leave the slots of a packed group go into its bulk buffers, in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compiler.ir.cache.layout import PARTS, LayerCache, cache_name, packed_of
from ..compiler.ir.cache.minicache import MiniCache
from ..compiler.ir.cache.packing import Packed
from ..compiler.ir.kv.codec import Seen, encode
from ..compiler.ir.kv.minicache import encode_pair

if TYPE_CHECKING:
    from .cache import Cache


def pack(cache: Cache, layer: LayerCache, index: int, row: int, used: int, leaving: int) -> None:
    """Encodes the first `leaving` of a row's `used` slots behind what is packed already."""
    group, prefix = layer.groups[index], cache_name(layer.layer, index)
    storage, lead = group.storage, group.policy.lead
    assert isinstance(storage, Packed)
    packed = int(cache.packed[packed_of(cache.layout.clock(group))][row])
    keys_KTD, values_KTD = _leaving(cache, prefix, row, lead, leaving)
    first = packed // storage.granule
    if isinstance(storage, MiniCache):
        follower = cache.layout.follower(layer, index)
        assert follower is not None  # the layout has checked it
        other = cache_name(follower.layer, index)
        pair = zip((keys_KTD, values_KTD), _leaving(cache, other, row, lead, leaving), strict=True)
        cut = [tuple(x.float().unflatten(1, (-1, storage.granule)) for x in two) for two in pair]
        for name, pieces in zip((prefix, other), encode_pair(storage, *cut), strict=True):
            _store(cache, name, row, first, pieces)
        return
    seen = _seen(cache, prefix, row, lead, used, leaving)
    _store(cache, prefix, row, first, encode(storage, keys_KTD, values_KTD, seen))


def _leaving(cache: Cache, prefix: str, row: int, lead: int, leaving: int) -> list[Tensor]:
    """Keys and values [K, leaving, D] of the tokens that leave."""
    return [
        _tensor(cache.buffers[f"{prefix}.{part}"][row])[:, lead : lead + leaving] for part in PARTS
    ]


def _store(cache: Cache, prefix: str, row: int, first: int, pieces: dict[str, Tensor]) -> None:
    """Writes pieces behind the `first` granules of a row's bulk."""
    for name, pieces_KGRW in pieces.items():
        bulk_KGRW = _tensor(cache.buffers[f"{prefix}.{name}"][row])
        bulk_KGRW[:, first : first + pieces_KGRW.shape[1]] = pieces_KGRW


def _seen(cache: Cache, prefix: str, row: int, lead: int, used: int, leaving: int) -> Seen:
    """What is known of how the leaving tokens were attended to."""
    score, largest = cache.buffers.get(f"{prefix}.score"), cache.buffers.get(f"{prefix}.query_max")
    return Seen(
        None if score is None else _tensor(score[row])[:, lead : lead + leaving],
        # A token sees itself, and every later query sees it.
        torch.arange(used - lead, used - lead - leaving, -1),
        None if largest is None else _tensor(largest[row]),
    )


def _tensor(buffer: Any) -> Tensor:
    """A buffer as a tensor that shares its memory."""
    return buffer if isinstance(buffer, Tensor) else torch.from_numpy(buffer)
