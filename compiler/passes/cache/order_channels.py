"""Puts the channels of each head in order around attention, where a storage asks for it.

    q, k -> q[order], k[order]       the logits are as they were, for both are in one order
    v -> v[order], o -> o[order^-1]  likewise the sums of values, put back

An order is a weight `cache.LAYER.GROUP.key_order` or `.value_order`, i64 [heads, size]: the channels of each
KV head as they shall stand. Channels are picked by an index over all heads of a token at once, of new tokens
alone.

Source: Accurate Block Quantization (Trukhanov & Soloveychik 2024, K-sort), which permutes the rows of the
projections when a model is compiled. Differs: queries and keys are put in order behind their rotary
embedding, which would turn other pairs of channels; so weights stay as they are, whatever they are stored in.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ...calibrate.observers.channel_orders import ChannelOrders
from ...calibrate.sites import layer as site_of
from ...calibrate.stream import Later
from ...ir.kv.layout import HeadGroup, LayerCache, cache_name
from ...ir.kv.store.packed import Packed
from ...ir.program import Editor, Program
from ...ir.weights import Weight
from .rotate_heads import UNTURNED, turned

aten = torch.ops.aten

#: Orders by parts of a token, "key" or "value".
Orders = Mapping[str, Weight]


def find_orders(program: Program, storage: Packed) -> None:
    """Adds to the program the orders that a storage asks for, of every group that has it.

    They are known once the calibration text was read (`calibrate/observers/channel_orders.py`).
    """
    assert program.layout is not None
    wanted = [each for each in program.layout.groups() if each[2].storage == storage]
    if not wanted or not storage.ordered:
        return
    layers = {layer.layer for layer, _, _ in wanted}
    observer = ChannelOrders(storage.together, storage.lead, storage.ordered, layers)
    found = Later(program, [observer])
    program.calibrations.append(found)
    for layer, index, group in wanted:
        for part in storage.ordered:
            name = f"{cache_name(layer.layer, index)}.{part}_order"
            shape = (len(group.heads), layer.size(part))
            program.cache_weights[name] = Weight(
                shape, torch.int64, partial(_order, found, layer, group, part)
            )


def _order(found: Later, layer: LayerCache, group: HeadGroup, part: str) -> Tensor:
    """Channels [heads, size] as they shall stand."""
    return found.at(site_of(layer.layer))[part][list(group.heads)]


def ordered(editor: Editor, given: dict[str, Any], orders: Orders, prefix: str) -> dict[str, Any]:
    """The arguments of an attention with heads in their orders, q along with k.

    A rotary embedding that they name comes to stand in front. k and v may be None, of a layer that reads
    what another one cached. `prefix` begins the names of weights.
    """
    found = dict(given)
    if "key" in orders:
        for name, what in (("q_BSHD", "query"), ("k_BSKD", "key")):
            if found[name] is not None:
                x_BSHD = turned(editor, given, given[name])
                found[name] = _picked(editor, x_BSHD, orders["key"], f"{prefix}.{what}_order")
        found |= UNTURNED
    if "value" in orders and found["v_BSKD"] is not None:
        name = f"{prefix}.value_order"
        found["v_BSKD"] = _picked(editor, found["v_BSKD"], orders["value"], name)
    return found


def ordered_back(editor: Editor, out_BSHD: fx.Node, orders: Orders, prefix: str) -> fx.Node:
    """What attention gives, as it is of values that were not put in order."""
    if "value" not in orders:
        return out_BSHD
    back = Weight(orders["value"].shape, torch.int64, lambda: orders["value"].load().argsort(dim=1))
    return _picked(editor, out_BSHD, back, f"{prefix}.output_order")


def _picked(editor: Editor, x_BSHD: fx.Node, order: Weight, name: str) -> fx.Node:
    """x with the channels of each head as the order [KV heads, size] of its KV head says."""
    heads, size = (int(each) for each in x_BSHD.meta["val"].shape[2:])
    group = heads // order.shape[0]

    def load() -> Tensor:
        order_HD = order.load().repeat_interleave(group, 0)
        return (order_HD + size * torch.arange(heads)[:, None]).flatten()

    if name in editor.program.weights:  # of a layer that another one reads
        index = editor.read(name)
    else:
        index = editor.weight(name, Weight((heads * size,), torch.int64, load))
    flat = editor.call(aten.flatten.using_ints, x_BSHD, 2, 3)
    picked = editor.call(aten.index_select.default, flat, 2, index)
    return editor.call(aten.unflatten.int, picked, 2, [heads, size])
