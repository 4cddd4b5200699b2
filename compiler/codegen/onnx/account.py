"""What onnxruntime takes of memory beside weights, cache and activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ...ir.kv.read.pages.paged import Paged
from ...ir.kv.read.reader import parse_reader
from ...ir.ops import einfold_ops
from ...ir.ops.packed import packed_storage
from ...ir.program import Program, call_arguments
from ...ir.quant.scheme import Scheme, read_scheme
from ..target import Held
from . import integer_attention
from .attention_bytes import (
    PRODUCTS_FROM,
    WIDENED_FROM,
    packed_bytes,
    plane_bytes,
    product_bytes,
    widened_bytes,
)
from .kernels import LONGEST, WIDE, runtime_bits
from .process import PROCESS


def plain_int8(found: Mapping[str, Any]) -> bool:
    """Whether attention is a plain softmax over all of its int8 slots: one token may be multiplied with them
    as integers, many have them widened."""
    keys = found["key_cache_BKCD"].meta["val"]
    plain = not found["window"] and not found["softcap"] and found["sinks_H"] is None
    return plain and not _biased(found) and keys.dtype == torch.int8


def takes_integers(found: Mapping[str, Any]) -> bool:
    """Whether decode steps may go by `integer_attention`."""
    return plain_int8(found) and _group(found) >= integer_attention.SMALLEST_GROUP


def takes_floats(found: Mapping[str, Any]) -> bool:
    """Whether decode steps may go by `float_attention`."""
    keys = found["key_cache_BKCD"].meta["val"]
    plain = keys.dtype == torch.float32 and not _biased(found)
    return plain and _group(found) >= PRODUCTS_FROM


def _biased(found: Mapping[str, Any]) -> bool:
    """Whether something is added to the logits."""
    return found.get("count_BK") is not None or found.get("by_distance_HR") is not None


def _group(found: Mapping[str, Any]) -> int:
    """Query heads a KV head."""
    heads = int(found["q_BSHD"].meta["val"].shape[2])
    return heads // int(found["key_cache_BKCD"].meta["val"].shape[1])


#: Copies that onnxruntime packs, as a share of the weights in the file. Of integers both stay resident (139
#: MB of memory for 96 MB of int4); of float16 the copy is float32, and the file's pages go.
_PACKED = {torch.int8: 0.6, torch.uint8: 0.6, torch.float16: 1.0}

#: Its arena grows by doubling: a step may leave twice its activations in it beside them.
_ARENA = 2


#: Copies of codes that are brought into another form when the model is loaded, as a share of that form: 74 MB
#: for 63 MB of 3-bit codes in 4 bits with their scales.
_UNPACKED = 1.2


def held(program: Program, exact: bool, flavour: str) -> Held:
    """Of float32 weights the file's mapped pages go as onnxruntime packs its copies: there is one of each.
    Weights of a scheme are held as the kernel reads them, see `kernels.py`."""
    packed, read = 0.0, set[str]()
    for node in program.nodes(*_OVER_PIECES):
        found = call_arguments(node)
        for pieces, shape in _OVER_PIECES[node.target]:
            names = [str(piece.target) for piece in found[pieces]]
            if names[0] not in read:
                packed += _held_of(read_scheme(found["scheme"]), found[shape], exact, flavour)
            read.update(names)
    weights = [program.weights[name] for name in program.weights if name not in read]
    packed += sum(_PACKED.get(weight.dtype, 0.0) * weight.nbytes for weight in weights)
    return Held(PROCESS, int(packed), _ARENA)


#: Products with weights in any scheme: which arguments are pieces, and which the shapes.
_OVER_PIECES: dict[Any, list[tuple[str, str]]] = {
    einfold_ops.stored_linear.default: [("pieces", "shape")],
    einfold_ops.stored_experts.default: [
        ("gate_up_pieces", "gate_up_shape"),
        ("down_pieces", "down_shape"),
    ],
}


def _held_of(scheme: Scheme, shape: list[int], exact: bool, flavour: str) -> float:
    """Bytes of a weight once it is loaded, beside the file's."""
    bits = runtime_bits(scheme, exact, flavour)
    if bits == WIDE:
        return 4.0 * math.prod(shape)
    scales = 4 * 8 / min(LONGEST, getattr(scheme, "block", 0) or LONGEST)
    return _UNPACKED * math.prod(shape) * (bits + scales) / 8


def scratch(program: Program, node: fx.Node, dims: Mapping[str, int], portable: bool) -> int:
    """Bytes that attention takes.

    GroupQueryAttention works in tiles, but holds B * H * S * C logits where it caps them or has sinks
    (measured with onnxruntime 1.31), and the `portable` flavour holds them always, twice where the softmax is
    spelled out. With S = 1 it is charged attention by products, over int8 of integers, whether or not C is
    such that steps go that way, and with many over int8 what is widened.
    """
    if node.target in _OPERANDS:
        return _scores(program, node, dims)
    if node.target is einfold_ops.bounded_attention.default:
        return _pages(program, node, dims)
    if node.target is einfold_ops.packed_attention.default:
        return _packed(program, node, dims)
    if node.target not in (
        einfold_ops.cached_attention.default,
        einfold_ops.shared_attention.default,
    ):
        return 0
    found = call_arguments(node)
    query = found["q_BSHD"].meta["val"]
    batch, new, heads = (program.shapes.evaluate(size, dims) for size in query.shape[:3])
    spelled_out = bool(found["softcap"]) or found["sinks_H"] is not None
    cache = found["key_cache_BKCD"].meta["val"]
    slots = program.shapes.evaluate(cache.shape[2], dims)
    kv_heads, size = cache.shape[1], cache.shape[3]
    own = node.target is einfold_ops.cached_attention.default and plain_int8(found)
    if own and new == 1 and takes_integers(found):
        # Two copies of the keys, or one and the products with both planes, or the weights with what their
        # planes are made of; and an eighth for gaps.
        keys, products = kv_heads * size, plane_bytes(kv_heads, _group(found))
        held = max(2 * keys, keys + products, 13 * heads)
        return int(batch * slots * held * 9 // 8)
    if own and new >= WIDENED_FROM:
        return batch * widened_bytes(kv_heads, heads, size, new, slots)
    added = 2 * int(found.get("by_distance_HR") is not None)  # as it is gathered, and turned
    if new == 1 and not portable and takes_floats(found):
        return batch * product_bytes(heads, slots)
    return 4 * batch * new * heads * slots * (int(portable) + int(spelled_out) + added)


def _pages(program: Program, node: fx.Node, dims: Mapping[str, int]) -> int:
    """Bytes of attention over pages: with one new token what is chosen of keys and values, as it is gathered,
    beside scores of pages and slots; over int8 the statistics and the keys shifted and multiplied by both
    planes of queries, or the values beside planes of weights; with several the tiles that GroupQueryAttention
    works in, or its logits, or what is widened, and the keys whose statistics are found anew."""
    found = call_arguments(node)
    query, keys = found["q_BSHD"].meta["val"], found["key_cache_BKCD"].meta["val"]
    batch, new, heads = (program.shapes.evaluate(size, dims) for size in query.shape[:3])
    slots = program.shapes.evaluate(keys.shape[2], dims)
    kv_heads, size = int(keys.shape[1]), int(keys.shape[3])
    reader, stored = parse_reader(found["read"]), keys.dtype.itemsize
    assert isinstance(reader, Paged)
    page, read = reader.page, reader.reads(slots)
    if new > 1:
        spelled_out = bool(found["softcap"]) or found["sinks_H"] is not None
        logits = 4 * new * heads * slots * int(spelled_out)
        many = new >= WIDENED_FROM and plain_int8(found)
        wide = widened_bytes(kv_heads, heads, size, new, slots) if many else 0
        taken = size * (stored + 4 * int(reader.widens and stored < 4))
        return int(batch * (logits + wide + kv_heads * (new + 2 * page) * taken))
    pages, held = slots // page + 2, kv_heads * size
    scores = 3 * 4 * heads * pages
    if stored >= 4:
        return int(batch * (scores + read * (2 * held * stored + 12 * heads)))
    products = plane_bytes(kv_heads, _group(found))
    over_bounds = pages * (2 * kv_heads * reader.bound_numbers(size) + products)
    over_chosen = read * (2 * held + max(2 * held + products, held + 22 * heads)) * 9 // 8
    return int(batch * (scores + max(over_bounds, over_chosen)))


def _packed(program: Program, node: fx.Node, dims: Mapping[str, int]) -> int:
    """Bytes of attention over packed tokens; over slots the logits where they are capped or have sinks."""
    found = call_arguments(node)
    storage = packed_storage(found["storage"])
    query, keys = found["q_BSHD"].meta["val"], found["key_cache_BKCD"].meta["val"]
    batch, new, heads = (program.shapes.evaluate(size, dims) for size in query.shape[:3])
    slots = program.shapes.evaluate(keys.shape[2], dims)
    room = storage.granule * program.shapes.evaluate(found["bulk"][0].meta["val"].shape[2], dims)
    spelled_out = bool(found["softcap"]) or found["sinks_H"] is not None
    logits = 4 * new * heads * slots * int(spelled_out)
    over_packed = packed_bytes(storage, int(keys.shape[1]), heads, int(keys.shape[3]), new, room)
    both = logits + over_packed if new == 1 else max(logits, over_packed)
    return int(batch * both)


#: What queries and keys of attention without a cache are called.
_OPERANDS: dict[Any, tuple[str, str]] = {
    torch.ops.aten.scaled_dot_product_attention.default: ("query", "key"),
    einfold_ops.softmax_attention.default: ("q_BHSD", "k_BKTD"),
}


def _scores(program: Program, node: fx.Node, dims: Mapping[str, int]) -> int:
    """Bytes of an encoder's attention: the scores and their softmax, which may be spelled out."""
    found = call_arguments(node)
    query, key = (found[name].meta["val"] for name in _OPERANDS[node.target])
    sizes = [program.shapes.evaluate(size, dims) for size in (*query.shape[:-1], key.shape[-2])]
    return int(2 * query.dtype.itemsize * math.prod(sizes))
