"""attach_cache: the compiler gives the model its KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.cache_layout import PARTS, cache_name
from ...ir.ops import einfold_ops
from ...ir.program import Editor, Program, attention_nodes, call_arguments, remove_dead_nodes
from ...ir.types import DTYPES
from ...ir.weights import Weight
from ..base import Pass, PassResult


@dataclass(frozen=True)
class AttachCache(Pass):
    """Turns attention over the tokens of a call into attention over a cache, as the layout says.

    Before: `%o = attention(%q, %k, %v, none, layer, ..)`
    After:  `%o, %kc, %vc = cached_attention(%q, %k, %v, %cache.key, %cache.value, %lengths, ..)`
    New inputs: `lengths` [B], tokens that each row's cache holds, and two buffers a head group; the
    buffers are outputs too. A rotary embedding in front of q and k moves into the operator, so that a
    target may turn them while it writes the cache.
    """

    name = "attach_cache"
    requires = frozenset({"cache planned"})
    ensures = frozenset({"cache attached"})

    def run(self, program: Program) -> PassResult:
        result, editor = PassResult(), Editor(program)
        nodes = attention_nodes(program)
        if not nodes or program.layout is None:
            result.skipped("graph", "no attention in the graph")
            return result
        lengths = editor.input("lengths", ["B"], torch.int64)
        names: list[str] = []
        values: list[fx.Node] = []
        for node in nodes:
            layer = int(call_arguments(node)["layer"])
            cache = program.layout[layer]
            storage = cache.groups[0].storage
            caches = [
                editor.input(
                    f"{cache_name(layer, 0)}.{part}",
                    ["B", cache.kv_heads, "C", cache.size(part)],
                    DTYPES[storage.dtype],
                )
                for part in PARTS
            ]
            scales = [program.cache_weights.pop(f"{c.target}_scale", None) for c in caches]
            updated = _attach(editor, node, caches, lengths, scales)
            values += updated
            names += [str(cache.target) for cache in caches]
            window = int(call_arguments(node)["window"])
            result.applied(
                f"layer {layer}",
                f"full cache in {storage}" + (f", window {window} by mask" if window else ""),
            )
        present = list(program.output.args[0])  # type: ignore[arg-type]
        editor.set_output(present + values, program.output_names() + names)
        remove_dead_nodes(program)
        return result


def _attach(
    editor: Editor,
    node: fx.Node,
    caches: list[fx.Node],
    lengths: fx.Node,
    scales: list[Weight | None],
) -> list[fx.Node]:
    """Replaces one attention; gives the updated caches."""
    found = call_arguments(node)
    query, key, rotary = _without_rotary(found["q_BSHD"], found["k_BSKD"])
    with editor.before(node):
        read = [
            None if scale is None else editor.weight(f"{cache.target}_scale", scale)
            for cache, scale in zip(caches, scales, strict=True)
        ]
        new = editor.call(
            einfold_ops.cached_attention.default,
            query,
            key,
            found["v_BSKD"],
            *caches,
            lengths,
            found["sinks_H"],
            *rotary[:3],
            *read,
            found["layer"],
            found["scale"],
            found["window"],
            found["softcap"],
            rotary[3],
        )
    out, *updated = editor.results(new)
    editor.replace(node, out)
    return updated


def _without_rotary(query: fx.Node, key: fx.Node) -> tuple[fx.Node, fx.Node, list[object]]:
    """q and k before their rotary embedding, and its (positions, cos, sin, interleaved)."""
    op = einfold_ops.rotary.default
    if query.target is op and key.target is op and query.args[1:] == key.args[1:]:
        return query.args[0], key.args[0], list(query.args[1:])  # type: ignore[return-value]
    return query, key, [None, None, None, False]
