"""Packing: tokens that leave the slots of a packed group go into its bulk buffers, in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compiler.ir.cache.layout import PARTS, LayerCache, cache_name, packed_of
from ..compiler.ir.cache.packing import Packed
from ..compiler.ir.kv.codec import Seen, encode

if TYPE_CHECKING:
    from .cache import Cache


def pack(cache: Cache, layer: LayerCache, index: int, row: int, used: int, leaving: int) -> None:
    """Encodes the first `leaving` of a row's `used` slots behind what is packed already."""
    group, prefix = layer.groups[index], cache_name(layer.layer, index)
    storage, lead = group.storage, group.policy.lead
    assert isinstance(storage, Packed)
    packed = int(cache.packed[packed_of(cache.layout.clock(group))][row])
    keys_KTD, values_KTD = (
        _tensor(cache.buffers[f"{prefix}.{part}"][row])[:, lead : lead + leaving] for part in PARTS
    )
    first = packed // storage.granule
    for name, pieces_KGRW in encode(
        storage, keys_KTD, values_KTD, _seen(cache, prefix, row, lead, used, leaving)
    ).items():
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
