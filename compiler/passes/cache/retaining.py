"""Retaining heads in the graph: what a trained network says of each token, for each KV head of a layer.

    told = silu([q, k, v] inner' + bias) outer'          [B, S, K]

q and k are as they were before their rotary embedding, so that a score does not go by the token's place. The
weights stand in `Program.cache_weights` until `attach_cache` puts them into the graph. Their names end in a
mark of the model that they were trained for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.kv.layout import HeadGroup
from ...ir.ops.linear import Linear
from ...ir.program import Editor, Program
from ...ir.weights import Weight

aten = torch.ops.aten

#: The weights of a layer's heads: [hidden, channels], [hidden], [KV heads, hidden].
PARTS = ("inner", "bias", "outer")


def name_of(layer: int, part: str, mark: str = "") -> str:
    """`cache.0.retaining_inner.MARK`; without a mark what such names begin with."""
    return f"cache.{layer}.retaining_{part}.{mark}"


def weights_of(program: Program, layer: int) -> dict[str, str]:
    """The names of a layer's weights by their parts."""
    return {
        part: name
        for part in PARTS
        for name in program.cache_weights
        if name.startswith(name_of(layer, part))
    }


def told(
    editor: Editor, given: dict[str, Any], layer: int, groups: Sequence[HeadGroup]
) -> list[fx.Node]:
    """What the heads of a layer say, [B, S, heads, 1] for each group; `given` are the arguments of the
    layer's attention, of all of its heads, before their rotary embedding."""
    names, held = weights_of(editor.program, layer), editor.program.cache_weights
    kind = given["q_BSHD"].meta["val"].dtype
    parts = {part: held.pop(name) for part, name in names.items()}
    batch = editor.call(aten.sym_size.int, given["q_BSHD"], 0)
    length = editor.call(aten.sym_size.int, given["q_BSHD"], 1)
    flat = []
    for x in ("q_BSHD", "k_BSKD", "v_BSKD"):
        heads, size = map(int, given[x].meta["val"].shape[2:])
        flat.append(editor.call(aten.reshape.default, given[x], [batch, length, heads * size]))
    inner, bias = (editor.weight(names[part], _as(parts[part], kind)) for part in PARTS[:2])
    hidden = editor.make(
        Linear, x=editor.call(aten.cat.default, flat, -1), weight_NM=inner, bias=bias
    )
    hidden = editor.call(aten.silu.default, hidden)
    found = []
    for index, group in enumerate(groups):
        outer, name = _as(parts["outer"], kind), names["outer"]
        if len(groups) > 1:
            outer = _rows(outer, group.heads)
            name = name.replace(f"cache.{layer}.", f"cache.{layer}.{index}.", 1)
        said = editor.make(Linear, x=hidden, weight_NM=editor.weight(name, outer), bias=None)
        found.append(editor.call(aten.unsqueeze.default, said, -1))
    return found


def reorder(program: Program, layer: int, order: Sequence[int], sizes: Sequence[int]) -> None:
    """Goes along with a permutation of a layer's KV heads; `sizes` are the channels of q, k and v that belong
    to one of them. Weights are of no other program's order then, and their names say so."""
    held = program.cache_weights
    for part, name in weights_of(program, layer).items():
        weight = held.pop(name)
        if part == "inner":
            columns, first = [], 0
            for size in sizes:
                place = first + torch.arange(len(order) * size).reshape(len(order), size)
                columns.append(place[list(order)].flatten())
                first += len(order) * size
            weight = _picked(weight, 1, torch.cat(columns))
        elif part == "outer":
            weight = _picked(weight, 0, torch.tensor(order))
        held[name if part == "bias" else f"{name}.by_group"] = weight


def _rows(weight: Weight, rows: Sequence[int]) -> Weight:
    picked = torch.tensor(rows)
    shape = (len(rows), *weight.shape[1:])
    return Weight(shape, weight.dtype, lambda: weight.load()[picked])


def _picked(weight: Weight, axis: int, order: Tensor) -> Weight:
    return Weight(weight.shape, weight.dtype, lambda: weight.load().index_select(axis, order))


def _as(weight: Weight, dtype: torch.dtype) -> Weight:
    return Weight(weight.shape, dtype, lambda: weight.load().to(dtype))
