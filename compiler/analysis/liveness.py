"""How many bytes of intermediate values are live at once while a program runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..ir.ops import einfold_ops
from ..ir.program import OVER_CACHES, Program, call_arguments

#: Query heads a KV head from which on decode steps over int8 go in integers on onnxruntime.
INTEGER_GROUP = 4

#: Calls whose result shares the memory of their input.
_VIEWS = {
    torch.ops.aten.reshape.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.dim,
}


def peak_activation_bytes(program: Program, dims: Mapping[str, int], portable: bool = False) -> int:
    """The largest sum of live intermediate values, with dims such as B, S, C, N given as numbers.

    Inputs, caches and weights are not counted; operators run in the graph's order. Attention is
    charged what its ONNX lowering takes: onnxruntime's GroupQueryAttention works in tiles, but holds
    B * H * S * C logits where it caps them or has sinks (measured with onnxruntime 1.31), and the
    `portable` flavour holds them always, twice where the softmax is spelled out. With S = 1 over int8 it is
    charged attention in integers, whether or not C is such that steps go that way.
    """
    sizes = {node: _bytes(program, node, dims) for node in program.graph.nodes}
    last = _last_use(program)
    live, peak = 0, 0
    for index, node in enumerate(program.graph.nodes):
        live += sizes[node]
        peak = max(peak, live + _scratch(program, node, dims, portable))
        for dead in last.get(index, ()):
            live -= sizes[dead]
    return peak


def _last_use(program: Program) -> dict[int, list[fx.Node]]:
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    ends: dict[int, list[fx.Node]] = {}
    for node in program.graph.nodes:
        # A view keeps what it looks at alive, so its own uses count for its source.
        users = set(node.users)
        frontier = [user for user in users if user.target in _VIEWS]
        while frontier:
            view = frontier.pop()
            frontier += [user for user in view.users if user.target in _VIEWS and user not in users]
            users |= set(view.users)
        ends.setdefault(max((order[user] for user in users), default=order[node]), []).append(node)
    return ends


def _bytes(program: Program, node: fx.Node, dims: Mapping[str, int]) -> int:
    if (
        node.op != "call_function"
        or node.target in _VIEWS
        or not isinstance(node.target, torch._ops.OpOverload)
    ):
        return 0
    value = node.meta["val"]
    if node.target in OVER_CACHES:
        value = value[0]  # the caches are updated in place
    return _value_bytes(program, value, dims)


def _value_bytes(program: Program, value: Any, dims: Mapping[str, int]) -> int:
    if isinstance(value, (tuple, list)):
        return sum(_value_bytes(program, item, dims) for item in value)
    if not isinstance(value, torch.Tensor):
        return 0
    total = value.dtype.itemsize
    for size in value.shape:
        total *= program.shapes.evaluate(size, dims)
    return total


def _scratch(program: Program, node: fx.Node, dims: Mapping[str, int], portable: bool) -> int:
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
    plain = not spelled_out and not found["window"] and found["count_BK"] is None
    own = node.target is einfold_ops.cached_attention.default and found["key_scale_KD"] is not None
    if own and plain and new == 1 and heads >= INTEGER_GROUP * kv_heads:
        # Two copies of the keys, or one and the products with both planes, or the weights with what their
        # planes are made of; and an eighth for gaps.
        keys = kv_heads * size
        held = max(2 * keys, keys + 8 * heads, 13 * heads)
        return int(batch * slots * held * 9 // 8)
    return 4 * batch * new * heads * slots * (int(portable) + int(spelled_out))
