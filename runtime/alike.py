"""Tokens change their slots, once, so that those of like keys come to lie in one page.

Attention over all slots is as before, for a key is rotated before it is stored and every later token sees
all of a chunk; bounds of pages of like keys are tight. Clusters of equal size, by keys alone and before any
query is known, are those of Squeezed Attention (Hooper et al. 2024), with these differences: a
chunk of tokens is cut into halves again and again, each time by k-means of two clusters of one size, so that
a cluster is a page; a page is scored by its bounds, not by its centroid, which loses what stands out.

Arrays may be NumPy's or torch's; the order is found in NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..compiler.ir.kv.attention_sums import host
from ..compiler.ir.kv.layout import PARTS, LayerCache, cache_name
from .buffers import CacheBuffers, Counts
from .page_statistics import find_pages

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

#: Rounds of finding the direction in which keys are spread most, and of k-means behind it.
_ROUNDS = 4

#: What a length is at least by which is divided.
_TINY = 1e-30


def regroup(cache: CacheBuffers, before_B: Counts) -> None:
    """Puts the chunks in order that have become whole since the rows had so many tokens."""
    reordered = cache.layout.reordered
    for reader in dict.fromkeys(group.reader for _, _, group in reordered):
        for row, (before, now) in enumerate(zip(before_B, cache.lengths, strict=True)):
            new = reader.chunks(int(now))[len(reader.chunks(int(before))) :]
            for layer, index, group in reordered if new else ():
                if group.reader == reader:
                    _regroup(cache, layer, index, row, new)


def _regroup(cache: CacheBuffers, layer: LayerCache, index: int, row: int, chunks: range) -> None:
    """Some chunks of one row and group, and the bounds of their pages."""
    group, prefix = layer.groups[index], cache_name(layer.layer, index)
    page, first, last = group.reader.bounded, chunks[0], chunks[-1] + chunks.step
    slots = {part: cache.buffers[f"{prefix}.{part}"][row][:, first:last] for part in PARTS}
    keys_KND = host(slots["key"])
    heads, _, size = keys_KND.shape
    scale_KD = cache.key_scales[prefix] if keys_KND.dtype == np.int8 else np.ones((1, size))
    like_KND = keys_KND * scale_KD[:, None].astype(np.float32)
    order = like_order(like_KND.reshape(-1, chunks.step, size), page)
    starts = chunks.step * np.arange(len(chunks))[:, None]
    order_KN = (order.reshape(heads, len(chunks), -1) + starts).reshape(heads, -1)
    at = (np.arange(heads)[:, None], order_KN)
    for part in slots.values():
        part[:] = part[at]
    find_pages(cache, layer, index, row, first, last)


def like_order(keys_BND: npt.NDArray[Any], page: int) -> Ints:
    """In which order N keys fill pages of like ones, [B, N]; N is `page` times a power of two.

    A part is cut in halves of equal size, until a part is a page: first along the direction in which its
    keys are spread most, then by k-means: along the line from one half's mean to the other's.
    """
    rows, count, size = keys_BND.shape
    order_BN = np.broadcast_to(np.arange(count), (rows, count))
    parts = keys_BND.astype(np.float32)[:, None]
    while parts.shape[2] > page:
        half = parts.shape[2] // 2
        mean = parts.mean(2, keepdims=True)
        along = _widest(parts - mean)
        for _ in range(_ROUNDS):
            lower = np.zeros(parts.shape[:3], np.float32)
            np.put_along_axis(lower, _order(parts, along)[..., :half], np.float32(1 / half), 2)
            along = (mean - lower[:, :, None] @ parts)[:, :, 0]  # half of what parts both means
        order = _order(parts, along)
        pairs = (np.arange(rows)[:, None, None], np.arange(parts.shape[1])[:, None], order)
        parts = parts[pairs].reshape(rows, -1, half, size)
        order_BN = np.take_along_axis(order_BN.reshape(order.shape), order, 2).reshape(rows, count)
    return order_BN


def _widest(centred: Floats) -> Floats:
    """The direction in which the keys of each part [B, P, N, D], less their mean, are spread most, about:
    [B, P, D]."""
    farthest = (centred**2).sum(3).argmax(2)
    along: npt.NDArray[Any] = np.take_along_axis(centred, farthest[..., None, None], 2)[:, :, 0]
    for _ in range(_ROUNDS):
        along = ((centred @ along[..., None]).swapaxes(2, 3) @ centred)[:, :, 0]
        along /= np.maximum(np.sqrt((along**2).sum(-1, keepdims=True)), _TINY)
    return along


def _order(parts: Floats, along: Floats) -> Ints:
    """The keys of each part in order along a direction, the older first where it tells no difference."""
    return (parts @ along[..., None])[..., 0].argsort(-1, kind="stable")
