"""Lowerings of cached attention.

`ort`: one GroupQueryAttention a layer, and beside it, in branches, what is faster for one token or for many
over int8. It writes the cache in place when past and present are bound to
one buffer, turns q and k itself, and reads a packed QKV as it comes from the fused projection. Its head
size must be a multiple of 8; its own rotary wants a multiple of 16 with half the rotary width a multiple
of 8. Other sizes are turned before it, or take the standard operators.

`portable`: TensorScatter (opset 24) writes the cache, in place when input and output are bound to one
buffer; a boolean mask says which slots a query sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from ....errors import UnsupportedError
from ...ir.kv.layout import TOKENS
from ...ir.kv.read.pages.paged import Paged
from ...ir.kv.read.reader import parse_reader
from ...ir.kv.store.storage import GroupShape
from ...ir.manifest import BLOCKS
from ...ir.ops import einfold_ops
from ...ir.ops.attention import halved, numbers_of
from ...ir.ops.packed import packed_storage, piece_names
from . import float_attention, integer_attention
from .account import plain_int8, takes_floats, takes_integers
from .attention_bytes import WIDENED_FROM, pieces_of
from .builder import CONTRIB
from .chosen_pages import Pages
from .einfold_ops import rotate
from .float_attention import FloatAttention, softmax_beside
from .integer_attention import IntegerAttention
from .lowerings import Context, lowering, unsupported
from .one_token import HIDDEN, appended, capped, hidden_slots, pays
from .packed_attention import PackedAttention
from .page_attention import PageAttention

aten = torch.ops.aten


@dataclass(frozen=True)
class _Call:
    """The parts of one cached attention that the lowerings need."""

    context: Context
    node: fx.Node
    found: dict[str, Any]

    @property
    def heads(self) -> int:
        return int(self.found["q_BSHD"].meta["val"].shape[2])

    @property
    def kv_heads(self) -> int:
        return int(self.found["key_cache_BKCD"].meta["val"].shape[1])

    @property
    def key_size(self) -> int:
        return numbers_of(self.found["key_cache_BKCD"].meta["val"])

    @property
    def value_size(self) -> int:
        return numbers_of(self.found["value_cache_BKCD"].meta["val"])

    @property
    def quantized(self) -> bool:
        """Whether the cache holds codes: int8, or two of 4 bits a byte."""
        return self.found["key_scale_KD"] is not None

    @property
    def halved(self) -> bool:
        """Whether a byte of the cache holds two codes."""
        return halved(self.found["key_cache_BKCD"].meta["val"])

    @property
    def rotary_width(self) -> int:
        """Coordinates that the attention itself turns; 0 where none."""
        cos = self.found["cos_PR"]
        return 0 if cos is None else 2 * int(cos.meta["val"].shape[1])

    def value(self, name: str) -> ir.Value:
        return self.context.value(self.found[name])

    def flat(self, name: str, heads: int, size: int) -> ir.Value:
        """q, k or v as [B, S, heads * size]."""
        node = self.found[name]
        if node.target is aten.reshape.default and node.args[0].meta["val"].dim() == 3:
            return self.context.value(node.args[0])
        return self.context.builder.reshape(self.context.value(node), [0, 0, heads * size])

    def turned(self, x_BSM: ir.Value, heads: int) -> ir.Value:
        """Rotary embedding as a node of its own, where the attention asks for one."""
        if not self.rotary_width:
            return x_BSM
        return rotate(
            self.context,
            x_BSM,
            self.value("positions_BS"),
            self.value("cos_PR"),
            self.value("sin_PR"),
            heads,
            self.rotary_width,
            self.key_size,
            bool(self.found["interleaved"]),
        )


@lowering(einfold_ops.cached_attention.default, flavour="ort")
def cached_attention_ort(context: Context, node: fx.Node) -> list[ir.Value]:
    call = _Call(context, node, context.arguments(node))
    if call.key_size % 8 or call.value_size != call.key_size:
        return _standard(call)
    return _group_query(call)


@lowering(einfold_ops.cached_attention.default, flavour="portable")
def cached_attention_portable(context: Context, node: fx.Node) -> list[ir.Value]:
    return _standard(_Call(context, node, context.arguments(node)))


def _group_query(call: _Call) -> list[ir.Value]:
    builder = call.context.builder
    given = _given(call)

    def by_operator() -> list[ir.Value]:
        return _of_several(call, *given)

    way = _by_products(call)
    if way is None:
        out, keys, values = by_operator()
    else:
        wanted, attention = way
        of_one = partial(_of_one_token, call, *given, attention)
        out, keys, values = builder.choose(wanted, of_one, by_operator)
    return [_by_heads(call, out), keys, values]


def _of_several(
    call: _Call, query: ir.Value, key: ir.Value | None, value: ir.Value | None, in_op: bool
) -> list[ir.Value]:
    """What `_operator` gives; with many new tokens over an int8 cache by widening what is in use once."""
    given = query, key, value, in_op
    if not plain_int8(call.found):
        return _operator(call, *given)
    context, builder = call.context, call.context.builder
    context.opset = max(context.opset, 24)  # TensorScatter
    ids = context.value(context.program.placeholder("input_ids"))
    many = builder.shared("GreaterOrEqual", builder.dim(ids, 1), builder.ints(WIDENED_FROM))
    return builder.choose(many, partial(_widened, call, *given), partial(_operator, call, *given))


def _widened(
    call: _Call, query: ir.Value, key: ir.Value | None, value: ir.Value | None, in_op: bool
) -> list[ir.Value]:
    """Some KV heads after the others, their used slots as float32, in GroupQueryAttentions that have no new
    tokens and give no cache. Scales are the queries' and the results' business."""
    builder = call.context.builder
    query, key, value = _apart(call, query, key, value, in_op)
    size, group = call.key_size, call.heads // call.kv_heads
    caches = _written(call, key, value, one=False)
    pieces = pieces_of(call.kv_heads)
    widths = [count * group * size for count in pieces]
    queries = builder.split(_scaled(call, query, "key_scale_KD"), widths, axis=2)
    last, total = _lengths(call)
    longest = builder.shared("Reshape", _longest(call), builder.ints(1))
    outs, first = [], 0
    for count, part in zip(pieces, queries, strict=True):
        end = builder.shared("Concat", builder.ints(first + count), longest, axis=0)
        span = builder.ints(first, 0), end, builder.ints(1, 2)
        wide = [builder.cast(builder.op("Slice", each, *span), torch.float32) for each in caches]
        none = _no_tokens(call, part, count)
        outs += builder.multi(
            "GroupQueryAttention",
            1,
            part,
            none,
            none,
            *wide,
            last,
            total,
            domain=CONTRIB,
            num_heads=count * group,
            kv_num_heads=count,
            scale=call.found["scale"],
        )
        first += count
    out = outs[0] if len(outs) == 1 else builder.op("Concat", *outs, axis=2)
    return [_scaled(call, out, "value_scale_KD"), *caches]


def _written(call: _Call, key: ir.Value, value: ir.Value, one: bool) -> list[ir.Value]:
    """Both caches with new tokens, `one` or several, behind those in use; as codes where there are scales."""
    return [
        appended(
            call.context.builder,
            call.value(cache),
            new,
            call.context.optional(call.found[scale]),
            call.value("used_B"),
            call.kv_heads,
            call.key_size,
            one,
        )
        for cache, new, scale in (
            ("key_cache_BKCD", key, "key_scale_KD"),
            ("value_cache_BKCD", value, "value_scale_KD"),
        )
    ]


def _scaled(call: _Call, x_BSM: ir.Value, scale: str) -> ir.Value:
    """Each query head's numbers times the scales of its KV head's channels."""
    builder, size = call.context.builder, call.key_size
    by_head = builder.reshape(x_BSM, [0, 0, call.kv_heads, -1, size])
    factor = builder.shared("Reshape", call.value(scale), builder.ints(call.kv_heads, 1, size))
    return builder.reshape(builder.op("Mul", by_head, factor), [0, 0, call.heads * size])


def _given(call: _Call) -> tuple[ir.Value, ir.Value | None, ir.Value | None, bool]:
    """Queries, keys and values as `_operator` takes them, and whether it turns queries and keys itself."""
    in_op = bool(call.rotary_width) and call.key_size % 16 == 0 and call.rotary_width % 16 == 0
    packed = _packed_qkv(call) if in_op or not call.rotary_width else None
    if packed is not None:
        return packed, None, None, in_op
    query = call.flat("q_BSHD", call.heads, call.key_size)
    key = call.flat("k_BSKD", call.kv_heads, call.key_size)
    value = call.flat("v_BSKD", call.kv_heads, call.value_size)
    if not in_op:
        query, key = call.turned(query, call.heads), call.turned(key, call.kv_heads)
    return query, key, value, in_op


def _by_heads(call: _Call, out_BSM: ir.Value) -> ir.Value:
    """A result as [B, S, H, D], which remembers what it was."""
    heads = call.context.builder.reshape(out_BSM, [0, 0, call.heads, call.value_size])
    call.context.flat[heads] = out_BSM
    return heads


@lowering(einfold_ops.bounded_attention.default, flavour="ort")
def bounded_attention_ort(context: Context, node: fx.Node) -> list[ir.Value]:
    """A step of one token reads the pages that are chosen; every other one reads everything."""
    call = _Call(context, node, context.arguments(node))
    if call.key_size % 8 or call.value_size != call.key_size:
        raise unsupported(
            node,
            "its prompts are read by GroupQueryAttention, whose heads have a multiple of 8 numbers, "
            "as many for keys as for values",
        )
    # TensorScatter; BitCast, where products are of integers
    context.opset = max(context.opset, 24 if call.found["key_scale_KD"] is None else 26)
    attention, given = _by_pages(call), _given(call)

    def whole() -> list[ir.Value]:
        out, keys, values = _of_several(call, *given)
        return [out, keys, values, attention.refreshed(call.value("bounds_BKPE"), keys)]

    def pages() -> list[ir.Value]:
        query, key, value = _apart(call, *given)
        keys, values = _written(call, key, value, one=True)
        bounds = attention.refreshed(call.value("bounds_BKPE"), keys)
        return [attention(query, keys, values, bounds), keys, values, bounds]

    out, *written = context.builder.choose(attention.pages.wanted(), pages, whole)
    return [_by_heads(call, out), *written]


#: What a call over packed tokens has none of.
_NOT_PACKED = {
    "window": 0,
    "count_BK": None,
    "key_scale_KD": None,
    "value_scale_KD": None,
    "by_distance_HR": None,
}


@lowering(einfold_ops.packed_attention.default, flavour="ort")
def packed_attention_ort(context: Context, node: fx.Node) -> list[ir.Value]:
    """GroupQueryAttention while nothing is packed, and a state over slots and packed tokens from then on."""
    call = _Call(context, node, context.arguments(node) | _NOT_PACKED)
    if call.value_size != call.key_size:
        raise unsupported(
            node,
            "onnxruntime's attention over slots has one head size for keys and values, here "
            f"{call.key_size} and {call.value_size}",
        )
    context.opset = max(context.opset, 24)  # TensorScatter
    builder, attention = context.builder, _over_packed(call)
    caches = [call.value(name) for name in ("key_cache_BKCD", "value_cache_BKCD")]
    reads = call.found["k_BSKD"] is None
    given = _given_to_reader(call) if reads else _given(call)
    visible = _visible(call)

    def over_slots() -> list[ir.Value]:
        return _operator(call, *given, 1 if reads else 3)

    def over_both() -> list[ir.Value]:
        query, key, value = _apart(call, *given)
        slots = caches if reads else _written(call, key, value, one=False)
        sinks = context.optional(call.found["sinks_H"])
        out = attention(query, slots[0], slots[1], visible, builder.dim(given[0], 1), sinks)
        return [out] if reads else [out, *slots]

    out, *written = builder.choose(attention.any_packed(), over_both, over_slots)
    return [_by_heads(call, out), *(caches if reads else written)]


def _over_packed(call: _Call) -> PackedAttention:
    context, found = call.context, call.found
    storage = packed_storage(found["storage"])
    shape = GroupShape(call.kv_heads, call.key_size, call.value_size)
    names = piece_names(storage, shape)
    return PackedAttention(
        context.builder,
        call.heads,
        call.kv_heads,
        call.key_size,
        storage.granule,
        found["scale"],
        found["softcap"],
        call.value("packed_B"),
        dict(zip(names, map(context.value, found["bulk"]), strict=True)),
        context.value(_leader(call)["bulk"][0]),
        storage.blocks(shape),
    )


def _by_pages(call: _Call) -> PageAttention:
    context, found = call.context, call.found
    reader = parse_reader(found["read"])
    assert isinstance(reader, Paged)
    ids = context.value(context.program.placeholder("input_ids"))
    first = next(
        other
        for other in map(
            context.arguments, context.program.nodes(einfold_ops.bounded_attention.default)
        )
        if (other["used_B"], other["read"]) == (found["used_B"], found["read"])
    )
    pages = Pages(
        context.builder,
        reader,
        call.kv_heads,
        call.value("used_B"),
        context.builder.dim(ids, 1),
        _totals(call),
        context.builder.dim(context.value(first["bounds_BKPE"]), 2),
    )
    return PageAttention(
        pages,
        call.heads,
        call.key_size,
        call.value_size,
        found["scale"],
        found["softcap"],
        context.optional(found["sinks_H"]),
        context.optional(found["key_scale_KD"]),
        context.optional(found["value_scale_KD"]),
    )


def _operator(
    call: _Call,
    query: ir.Value,
    key: ir.Value | None,
    value: ir.Value | None,
    in_op: bool,
    results: int = 3,
) -> list[ir.Value]:
    """GroupQueryAttention; `query` is the packed QKV where key and value are None. The results are the output
    and, of three, both caches with the new tokens."""
    context, found = call.context, call.found
    last, total = _lengths(call)
    return context.builder.multi(
        "GroupQueryAttention",
        results,
        query,
        key,
        value,
        call.value("key_cache_BKCD"),
        call.value("value_cache_BKCD"),
        last,
        total,
        call.value("cos_PR") if in_op else None,
        call.value("sin_PR") if in_op else None,
        call.value("positions_BS") if in_op else None,
        _bias(call, total) if found.get("by_distance_HR") is None else _by_distance(call),
        context.optional(found["sinks_H"]),
        context.optional(found["key_scale_KD"]),
        context.optional(found["value_scale_KD"]),
        domain=CONTRIB,
        kv_cache_bit_width=(4 if call.halved else 8) if call.quantized else None,
        k_quant_type="PER_CHANNEL" if call.quantized else None,
        v_quant_type="PER_CHANNEL" if call.quantized else None,
        num_heads=call.heads,
        kv_num_heads=call.kv_heads,
        scale=found["scale"],
        softcap=found["softcap"] or None,
        local_window_size=found["window"] or -1,
        do_rotary=int(in_op),
        rotary_interleaved=int(found["interleaved"]),
    )


def _by_products(call: _Call) -> tuple[ir.Value, IntegerAttention | FloatAttention] | None:
    """(whether this step goes by products with what all slots hold, how), or None where none does. The former
    and the mask are shared by layers with the same counter, group and window."""
    if takes_integers(call.found):
        return _over_integers(call)
    return _over_floats(call) if takes_floats(call.found) else None


def _over_integers(call: _Call) -> tuple[ir.Value, IntegerAttention]:
    context, builder = call.context, call.context.builder
    context.opset = max(context.opset, 26)  # TensorScatter, BitCast
    slots, wanted = _of_one(call, integer_attention.FEWEST_TOKENS)
    wanted = builder.shared("And", wanted, integer_attention.in_blocks(builder, slots))
    if call.found["used_B"].target == TOKENS:  # the runtime chooses no other counter's slots
        context.metadata[BLOCKS] = integer_attention.blocks()
    return wanted, IntegerAttention(
        builder,
        call.heads,
        call.kv_heads,
        call.key_size,
        call.found["scale"],
        call.value("key_scale_KD"),
        call.value("value_scale_KD"),
        integer_attention.mask(builder, call.value("used_B"), slots, wanted),
    )


def _over_floats(call: _Call) -> tuple[ir.Value, FloatAttention]:
    context, builder = call.context, call.context.builder
    context.opset = max(context.opset, 24)  # TensorScatter
    slots, wanted = _of_one(call, float_attention.fewest_tokens(call.heads // call.kv_heads))
    used, window = call.value("used_B"), int(call.found["window"])
    return wanted, FloatAttention(
        builder,
        call.heads,
        call.kv_heads,
        call.key_size,
        call.found["scale"],
        call.found["softcap"],
        context.optional(call.found["sinks_H"]),
        hidden_slots(builder, used, slots, wanted, window=window),
    )


def _of_one(call: _Call, fewest: int) -> tuple[ir.Value, ir.Value]:
    """(the slots, whether this step is of one token that sees most of them, and so many at least)."""
    context, builder = call.context, call.context.builder
    ids = context.value(context.program.placeholder("input_ids"))
    slots = builder.dim(context.value(_leader(call)["key_cache_BKCD"]), 2)
    longest = builder.shared("Reshape", _longest(call), builder.ints(1))
    return slots, pays(builder, builder.dim(ids, 1), longest, slots, fewest)


def _of_one_token(
    call: _Call,
    query: ir.Value,
    key: ir.Value | None,
    value: ir.Value | None,
    in_op: bool,
    attention: IntegerAttention | FloatAttention,
) -> list[ir.Value]:
    """What `_operator` gives, for one new token."""
    query, key, value = _apart(call, query, key, value, in_op)
    caches = _written(call, key, value, one=True)
    return [attention(query, *caches), *caches]


def _apart(
    call: _Call, query: ir.Value, key: ir.Value | None, value: ir.Value | None, in_op: bool
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """What `_operator` is given as queries, keys and values, each [B, S, M]; the first two turned."""
    if key is None or value is None:
        sizes = [n * call.key_size for n in (call.heads, call.kv_heads, call.kv_heads)]
        query, key, value = call.context.builder.split(query, sizes, axis=2)
    if in_op:
        query, key = call.turned(query, call.heads), call.turned(key, call.kv_heads)
    return query, key, value


def _packed_qkv(call: _Call) -> ir.Value | None:
    """The fused projection [B, S, (H + 2K) D], where q, k and v are just its parts in order."""
    sources = []
    for index, name in enumerate(("q_BSHD", "k_BSKD", "v_BSKD")):
        node = call.found[name]
        if node.target is not aten.reshape.default:
            return None
        part = node.args[0]
        if part.op != "call_function" or part.args[0].target is not aten.split_with_sizes.default:
            return None
        if part.args[1] != index or len(part.args[0].args[1]) != 3:
            return None
        sources.append(part.args[0])
    if len(set(sources)) != 1:
        return None
    return call.context.value(sources[0].args[0])


def _lengths(call: _Call) -> tuple[ir.Value, ir.Value]:
    """(index of the last valid token of each row, longest total length), int32, shared by all layers."""
    builder = call.context.builder
    last = builder.shared("Sub", _totals(call), builder.ints(1))
    int32 = int(ir.DataType.INT32)
    return builder.shared("Cast", last, to=int32), builder.shared("Cast", _longest(call), to=int32)


def _totals(call: _Call) -> ir.Value:
    """Tokens of each row, the new ones among them, int64 [B]."""
    context, builder = call.context, call.context.builder
    ids = context.value(context.program.placeholder("input_ids"))
    return builder.shared("Add", call.value("used_B"), builder.dim(ids, 1))


def _longest(call: _Call) -> ir.Value:
    return call.context.builder.shared("ReduceMax", _totals(call), keepdims=0)


def _leader(call: _Call) -> dict[str, Any]:
    """The arguments of the first call that goes by the same counter, with as many slots.

    Their compensation tokens stand for as many tokens. Slots that are read by pages are whole pages, so that
    others with their counter may have fewer.
    """
    calls = call.context.program.nodes(
        einfold_ops.cached_attention.default,
        einfold_ops.bounded_attention.default,
        einfold_ops.packed_attention.default,
    )
    arguments = map(call.context.arguments, calls)
    used, slots = call.found["used_B"], _slots(call.found)
    return next(found for found in arguments if found["used_B"] is used and _slots(found) == slots)


def _slots(found: dict[str, Any]) -> str:
    """The slots of a call's cache, as its program calls them."""
    return str(found["key_cache_BKCD"].meta["val"].shape[2])


def _log_count(call: _Call) -> ir.Value:
    """What slot 0 adds to its logit, [B, 1, 1, 1]: log(count), or enough to hide it where it stands for
    nothing. One for all heads: they let go of their tokens at the same time."""
    builder = call.context.builder
    counts = call.context.value(_leader(call)["count_BK"])
    count = builder.shared("Slice", counts, builder.ints(0), builder.ints(1), builder.ints(1))
    some = builder.shared("Greater", count, builder.floats(0.0))
    log = builder.shared("Log", builder.shared("Max", count, builder.floats(1.0)))
    shown = builder.shared("Where", some, log, builder.floats(HIDDEN))
    return builder.shared("Reshape", shown, builder.ints(-1, 1, 1, 1))


def _bias(call: _Call, total: ir.Value) -> ir.Value | None:
    """GroupQueryAttention's attention_bias [B, 1, S, total]: zeros behind slot 0."""
    if call.found["count_BK"] is None:
        return None
    context, builder = call.context, call.context.builder
    ids = context.value(context.program.placeholder("input_ids"))
    one = builder.ints(1)
    shape = builder.shared("Concat", one, one, builder.dim(ids, 1), one, axis=0)
    column = builder.shared("Expand", _log_count(call), shape)
    wide = builder.shared("Cast", total, to=int(ir.DataType.INT64))
    more = builder.shared("Reshape", builder.shared("Sub", wide, one), one)
    pads = builder.shared("Concat", builder.ints(*[0] * 7), more, axis=0)
    return builder.shared("Pad", column, pads)


def _by_distance(call: _Call, slots: ir.Value | None = None) -> ir.Value:
    """What is added to the logits, [B, H, S, T], by how far a key stands before the query; of so many slots,
    or of those in use. Layers with one table share it."""
    context, builder = call.context, call.context.builder
    table = context.value(call.found["by_distance_HR"])
    zero, one = builder.constant(0, np.int64), builder.constant(1, np.int64)
    ids = context.value(context.program.placeholder("input_ids"))
    last = builder.shared("Sub", builder.dim(table, 1), builder.ints(1))

    def count(size: ir.Value) -> ir.Value:
        return builder.shared("Range", zero, builder.shared("Squeeze", size), one)

    starts = builder.shared("Unsqueeze", call.value("used_B"), builder.ints(1, 2))
    steps = builder.shared("Unsqueeze", count(builder.dim(ids, 1)), builder.ints(1))
    places = builder.shared("Add", starts, steps)  # [B, S, 1], the slot of each new token
    behind = builder.shared("Sub", places, count(_longest(call) if slots is None else slots))
    within = builder.shared("Max", builder.shared("Min", behind, last), builder.ints(0))
    bias = builder.shared("Gather", table, within, axis=1)
    return builder.shared("Transpose", bias, perm=[1, 0, 2, 3])


@lowering(einfold_ops.shared_attention.default, flavour="ort")
def shared_attention_ort(context: Context, node: fx.Node) -> ir.Value:
    """GroupQueryAttention with a key and value of no tokens, or products of one token with float32 slots.

    Without a present it reads the owner's cache where it stands. Over codes it insists on a present, which is
    bound to the same buffer.
    """
    call = _Call(context, node, context.arguments(node))
    if call.key_size % 8 or call.value_size != call.key_size:
        return _shared_standard(call)
    found = call.found
    given = _given_to_reader(call)
    if takes_floats(found):
        wanted, attention = _over_floats(call)
        owned = [call.value(name) for name in ("key_cache_BKCD", "value_cache_BKCD")]
        (out,) = call.context.builder.choose(
            wanted,
            lambda: [attention(given[0], *owned)],
            lambda: _operator(call, *given, 1),
        )
        return _by_heads(call, out)
    out, *presents = _operator(call, *given, 3 if call.quantized else 1)
    for name, present in zip(("key_cache_BKCD", "value_cache_BKCD"), presents, strict=False):
        owner = context.arguments(found[name].args[0])[name]
        context.rewritten.append((f"{owner.target}@{found['layer']}", present, owner))
    return _by_heads(call, out)


def _given_to_reader(call: _Call) -> tuple[ir.Value, ir.Value, ir.Value, bool]:
    """What `_given` gives, of a layer that reads another's cache: a key and a value of no tokens."""
    query = call.turned(call.flat("q_BSHD", call.heads, call.key_size), call.heads)
    none = _no_tokens(call, query, call.kv_heads)
    return query, none, none, False


def _no_tokens(call: _Call, query_BSM: ir.Value, kv_heads: int) -> ir.Value:
    """A key or a value of no tokens for so many KV heads."""
    builder = call.context.builder
    end = builder.ints(0, kv_heads * call.key_size)
    return builder.op("Slice", query_BSM, builder.ints(0, 0), end, builder.ints(1, 2))


@lowering(einfold_ops.shared_attention.default, flavour="portable")
def shared_attention_portable(context: Context, node: fx.Node) -> ir.Value:
    return _shared_standard(_Call(context, node, context.arguments(node)))


def _shared_standard(call: _Call) -> ir.Value:
    builder = call.context.builder
    _refuse_codes(call)
    query = call.turned(call.flat("q_BSHD", call.heads, call.key_size), call.heads)
    query = builder.transpose(builder.reshape(query, [0, 0, call.heads, call.key_size]), 0, 2, 1, 3)
    return _attend(call, query, call.value("key_cache_BKCD"), call.value("value_cache_BKCD"))


def _refuse_codes(call: _Call) -> None:
    if call.quantized:
        raise UnsupportedError(
            f"layer {call.found['layer']}: a cache of codes is read by GroupQueryAttention alone, which "
            "wants the default flavour and one head size for keys and values, a multiple of 8 (here "
            f"{call.key_size} and {call.value_size}); use cache.storage f32"
        )


def _standard(call: _Call) -> list[ir.Value]:
    context, builder = call.context, call.context.builder
    _refuse_codes(call)
    context.opset = max(context.opset, 24)  # TensorScatter
    query = call.turned(call.flat("q_BSHD", call.heads, call.key_size), call.heads)
    key = call.turned(call.flat("k_BSKD", call.kv_heads, call.key_size), call.kv_heads)
    value = call.flat("v_BSKD", call.kv_heads, call.value_size)
    lengths = call.value("used_B")

    def heads_first(x: ir.Value, heads: int, size: int) -> ir.Value:
        return builder.transpose(builder.reshape(x, [0, 0, heads, size]), 0, 2, 1, 3)

    query = heads_first(query, call.heads, call.key_size)
    caches = [
        builder.op(
            "TensorScatter",
            call.value(cache),
            heads_first(new, call.kv_heads, size),
            lengths,
            axis=2,
        )
        for cache, new, size in (
            ("key_cache_BKCD", key, call.key_size),
            ("value_cache_BKCD", value, call.value_size),
        )
    ]
    return [_attend(call, query, caches[0], caches[1]), *caches]


def _attend(call: _Call, query_BHSD: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
    """Attention over the slots in standard operators, [B, S, H, D]."""
    found, context, builder = call.found, call.context, call.context.builder
    visible = _visible(call)
    if found["count_BK"] is not None:
        visible = _with_count(call, visible)
    if found.get("by_distance_HR") is not None:
        slots = builder.dim(context.value(_leader(call)["key_cache_BKCD"]), 2)
        hidden = builder.floats(float("-inf"))
        visible = builder.shared("Where", visible, _by_distance(call, slots), hidden)
    if found["softcap"] or found["sinks_H"] is not None:
        out = _spelled_out(call, query_BHSD, keys, values, visible)
    else:
        out = builder.op("Attention", query_BHSD, keys, values, visible, scale=found["scale"])
    return builder.transpose(out, 0, 2, 1, 3)


def _visible(call: _Call) -> ir.Value:
    """Which cache slots each new token sees: bool [B, 1, S, C], shared by layers with the same window."""
    context, builder = call.context, call.context.builder
    ids = context.value(context.program.placeholder("input_ids"))
    zero, one = builder.constant(0, np.int64), builder.constant(1, np.int64)

    def count(size: ir.Value) -> ir.Value:
        return builder.shared("Range", zero, builder.shared("Squeeze", size), one)

    capacity = builder.dim(context.value(_leader(call)["key_cache_BKCD"]), 2)
    starts = builder.shared("Unsqueeze", call.value("used_B"), builder.ints(1, 2))
    steps = builder.shared("Unsqueeze", count(builder.dim(ids, 1)), builder.ints(1))
    slots = builder.shared("Add", starts, steps)  # [B, S, 1], the slot of each new token
    slots = builder.shared("Unsqueeze", slots, builder.ints(1))
    index = count(capacity)
    visible = builder.shared("LessOrEqual", index, slots)
    window = call.found["window"]
    if window:
        oldest = builder.shared("Sub", slots, builder.ints(window))
        visible = builder.shared("And", visible, builder.shared("Greater", index, oldest))
    return visible


def _with_count(call: _Call, visible: ir.Value) -> ir.Value:
    """The mask as what is added to the logits, f32 [B, 1, S, C], slot 0 with the logarithm of its count."""
    builder = call.context.builder
    capacity = builder.dim(call.context.value(_leader(call)["key_cache_BKCD"]), 2)
    more = builder.shared("Sub", capacity, builder.ints(1))
    pads = builder.shared("Concat", builder.ints(*[0] * 7), more, axis=0)
    row = builder.shared("Pad", _log_count(call), pads)
    return builder.shared("Where", visible, row, builder.floats(float("-inf")))


def _spelled_out(
    call: _Call, query_BHSD: ir.Value, keys: ir.Value, values: ir.Value, visible: ir.Value
) -> ir.Value:
    """Softmax attention in elementary operators, for softcap and sinks; grouped heads by reshape."""
    found, builder = call.found, call.context.builder
    group = call.heads // call.kv_heads
    ids = call.context.value(call.context.program.placeholder("input_ids"))
    new = builder.dim(ids, 1)

    def shape(*parts: int | ir.Value) -> ir.Value:
        return builder.op(
            "Concat", *(builder.ints(p) if isinstance(p, int) else p for p in parts), axis=0
        )

    rows = builder.shared("Mul", new, builder.ints(group))
    query = builder.op("Reshape", query_BHSD, shape(0, call.kv_heads, rows, call.key_size))
    logits = builder.op("MatMul", query, builder.transpose(keys, 0, 1, 3, 2))
    logits = builder.op("Mul", logits, builder.floats(found["scale"]))
    logits = capped(builder, logits, found["softcap"])
    logits = builder.op("Reshape", logits, shape(0, call.heads, new, -1))
    if found["count_BK"] is not None or found.get("by_distance_HR") is not None:
        logits = builder.op("Add", logits, visible)
    else:
        logits = builder.op("Where", visible, logits, builder.floats(float("-inf")))
    sinks = call.context.optional(found["sinks_H"])
    if sinks is not None:
        sinks = builder.reshape(sinks, [1, call.heads, 1, 1])
    weights = softmax_beside(builder, logits, sinks)
    weights = builder.op("Reshape", weights, shape(0, call.kv_heads, rows, -1))
    out = builder.op("MatMul", weights, values)
    return builder.op("Reshape", out, shape(0, call.heads, new, call.value_size))
