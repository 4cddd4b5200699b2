"""Statistics of pages are found anew where tokens change their slots between steps.

A step of the graph brings those of the pages that it writes tokens into up to date; it knows nothing of what
the runtime moves. Arrays may be NumPy's or torch's: what is found is found in NumPy.
"""

from __future__ import annotations

import numpy as np

from ..compiler.ir.kv.attention_sums import host, like
from ..compiler.ir.kv.layout import BOUNDS, LayerCache, cache_name
from .buffers import CacheBuffers


def find_pages(
    cache: CacheBuffers, layer: LayerCache, index: int, row: int, first: int, last: int
) -> None:
    """Those of one row and group from slot `first` on, which begins a page, to before `last`.

    Slots behind these in the last page count as the newest: what they hold from before stands for nothing.
    """
    reader, prefix = layer.groups[index].reader, cache_name(layer.layer, index)
    if not reader.bounded or last <= first:
        return
    pages = -(-(last - first) // reader.bounded)
    slots = first + np.arange(pages * reader.bounded)
    keys_KCD = cache.buffers[f"{prefix}.key"][row]
    keys_KND = host(keys_KCD[:, first:last])[:, slots.clip(max=last - 1) - first]
    heads, _, size = keys_KND.shape
    found = reader.numbers_of(keys_KND.reshape(heads, pages, reader.bounded, size))
    held = cache.buffers[f"{prefix}.{BOUNDS}"][row]
    start = first // reader.bounded
    held[:, start : start + pages] = like(found, held)
