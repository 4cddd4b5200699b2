"""plan_cache: the table of caches that the later cache passes refine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...ir.kv.layout import CacheLayout, HeadGroup, LayerCache
from ...ir.program import Program, attention_nodes, call_arguments
from ..base import Pass, PassResult


@dataclass(frozen=True)
class PlanCache(Pass):
    """Gives each attention layer a cache that holds every token of every KV head in float32.

    A layer that attends over the keys and values of an earlier one, as deep layers of Gemma 4 do, reads that
    layer's cache and has none of its own.

    Before: no cache layout.
    After:  `cache 0.0 heads=0,1 of=2 key=64 value=64 policy=full storage=f32`, and so for each layer;
            `owner=0` where layer 0 is read.
    """

    name = "plan_cache"
    ensures = frozenset({"cache planned"})

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        nodes = attention_nodes(program)
        if not nodes:
            result.skipped("graph", "no attention in the graph")
            return result
        layers: list[LayerCache] = []
        owners: dict[tuple[object, ...], int] = {}
        for node in nodes:
            found = call_arguments(node)
            layer = int(found["layer"])
            # A window is part of it: an owner with a smaller one would let go of what its reader sees.
            owner = owners.setdefault((found["k_BSKD"], found["v_BSKD"], found["window"]), layer)
            layers.append(_cache(found, None if owner == layer else owner))
            if owner != layer:
                result.applied(
                    f"layer {layer}", f"reads the cache of layer {owner}, as the model does"
                )
        program.layout = CacheLayout(tuple(layers))
        own = sum(layer.groups[0].owner is None for layer in layers)
        result.applied("graph", f"{own} layers, every token of every KV head in f32")
        return result


def _cache(found: Mapping[str, Any], owner: int | None) -> LayerCache:
    keys, values = found["k_BSKD"].meta["val"], found["v_BSKD"].meta["val"]
    heads = int(keys.shape[2])
    group = HeadGroup(heads=tuple(range(heads)), owner=owner)
    return LayerCache(
        int(found["layer"]), heads, int(keys.shape[3]), int(values.shape[3]), (group,)
    )
