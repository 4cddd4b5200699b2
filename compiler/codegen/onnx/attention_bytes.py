"""Bytes that attention takes beside the cache, for one layer at a time; read where there is no torch."""

from __future__ import annotations

from ...ir.kv.layout import CacheLayout
from ...ir.kv.store.packed import Packed
from ...ir.kv.store.storage import GroupShape
from .process import PAIRS

#: New tokens from which on what is in use of an int8 cache is widened once in each layer. Over int8
#: GroupQueryAttention itself took three to four times as long with 512 new tokens behind 3,584. With 8
#: the two were even, with 32 this took 0.5 to 0.7 of the time.
WIDENED_FROM = 32

#: Query heads a KV head from which on a step of one token over float32 slots goes by products of matrices
#: (`float_attention`). With one GroupQueryAttention took as long.
PRODUCTS_FROM = 2

#: KV heads are widened in so many pieces at most, one after the other, so that few float32 are held at once.
_PIECES = 4

#: Columns that onnxruntime's product of integers has kernels for, or twice as many: with 14, as two planes of
#: 7 query heads are, it took 1.1 to 1.2 times as long as with 16.
_COLUMNS = 8


def columns_of(group: int) -> int:
    """Columns that both planes of so many query heads make, with some of zeros."""
    return -(-2 * group // _COLUMNS) * _COLUMNS


def plane_bytes(kv_heads: int, group: int) -> int:
    """Of one row of keys or bounds its products with both planes of all queries, as floats."""
    return 4 * kv_heads * columns_of(group)


def pieces_of(kv_heads: int) -> list[int]:
    """How many KV heads are widened at a time."""
    count = min(_PIECES, kv_heads)
    return [kv_heads // count + (place < kv_heads % count) for place in range(count)]


def widened_bytes(kv_heads: int, heads: int, size: int, new: int, slots: int) -> int:
    """Of a row's keys and values as the heads of a piece are sliced and widened, and a quarter for gaps (12.5
    bytes a number and slot were measured where two parts of 1 and 4 stand), beside queries by piece, results
    and both together."""
    return (
        2 * max(pieces_of(kv_heads)) * size * slots * (1 + 4) * 5 // 4 + 3 * 4 * new * heads * size
    )


def product_bytes(heads: int, slots: int) -> int:
    """Of a row's logits and weights over float32 slots, for one new token, beside sinks too: of 12 heads and
    a million slots 110 MiB were measured, 92 of these, and the mask with what it is made of."""
    return 2 * 4 * heads * slots


def packed_bytes(storage: Packed, kv_heads: int, heads: int, size: int, new: int, room: int) -> int:
    """Of a row with room for so many packed tokens: a copy of what is read of them, and with one new token
    the codes of keys taken apart, the products with both planes of queries, or weights with what their planes
    are made of; with several, keys and values as they are widened, beside logits and weights."""
    shape = GroupShape(kv_heads, size, size)
    copy = storage.granule_bytes(shape) // storage.granule
    if new == 1:
        codes, rows = kv_heads * size, heads * storage.blocks(shape)
        each = max(3 * codes // 2, codes + 12 * rows, codes // 2 + 18 * rows) * 9 // 8
        return room * (copy + each)
    over_packed = min(new, storage.slack, max(1, PAIRS // max(1, room)))
    return room * (copy + 14 * kv_heads * size + 12 * heads * over_packed)


def of_layout(
    layout: CacheLayout, group: int, chunk: int, capacity: int, logits: bool = False
) -> int:
    """The most that a layer takes in a step of `chunk` tokens or of one over a cache for so many, by what its
    slots hold; `group` query heads share a KV head. With a cap or sinks GroupQueryAttention holds all of a
    step's `logits`."""
    most = 0
    for layer in layout.layers:
        for each in layer.groups:
            shape, storage = layer.shape(each), each.storage
            sizes = shape.heads, group * shape.heads, shape.key_size
            if isinstance(storage, Packed):
                room = storage.granule * storage.granules(capacity)
                most = max(most, *(packed_bytes(storage, *sizes, n, room) for n in (1, chunk)))
                continue
            if logits:
                most = max(most, 4 * chunk * group * shape.heads * capacity)
            if storage.slot_dtype == "i8" and chunk >= WIDENED_FROM:
                most = max(most, widened_bytes(*sizes, chunk, capacity))
            if storage.slot_dtype == "f32" and group >= PRODUCTS_FROM:
                most = max(most, product_bytes(group * shape.heads, capacity))
    return most
