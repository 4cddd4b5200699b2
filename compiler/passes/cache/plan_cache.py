"""plan_cache: the table of caches that the later cache passes refine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...ir.cache.layout import CacheLayout, HeadGroup, LayerCache
from ...ir.program import Program, attention_nodes, call_arguments
from ..base import Pass, PassResult


@dataclass(frozen=True)
class PlanCache(Pass):
    """Gives each attention layer a cache that holds every token of every KV head in float32.

    Before: no cache layout.
    After:  `cache 0.0 heads=0,1 of=2 key=64 value=64 policy=full storage=f32`, and so for each layer.
    """

    name = "plan_cache"
    ensures = frozenset({"cache planned"})

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        nodes = attention_nodes(program)
        if not nodes:
            result.skipped("graph", "no attention in the graph")
            return result
        program.layout = CacheLayout(tuple(_full_cache(node) for node in nodes))
        result.applied("graph", f"{len(nodes)} layers, every token of every KV head in f32")
        return result


def _full_cache(node: fx.Node) -> LayerCache:
    found = call_arguments(node)
    keys, values = found["k_BSKD"].meta["val"], found["v_BSKD"].meta["val"]
    heads = int(keys.shape[2])
    group = HeadGroup(heads=tuple(range(heads)))
    return LayerCache(
        int(found["layer"]), heads, int(keys.shape[3]), int(values.shape[3]), (group,)
    )
