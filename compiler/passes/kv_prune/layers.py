"""What the pruning methods share: which layers they may prune, and how the layout is changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...ir.kv.keep.policy import Policy
from ...ir.kv.layout import CacheLayout, LayerCache
from ...ir.program import Program, attention_nodes, call_arguments, own_windows
from ..base import PassResult, check_lets_go


def prunable(program: Program, result: PassResult, policy: Policy) -> Iterator[LayerCache]:
    """The layers whose caches hold every token; the others are noted as skipped, with the reason.

    Raises RecipeError where the context has no more tokens than a policy has slots for.
    """
    if program.layout is None:
        result.skipped("graph", "no attention in the graph")
        return
    kept = policy.lead + policy.newest
    check_lets_go(program, "cache.prune: the method", kept, policy.waiting, "pruned")
    windows = own_windows(program)
    for layer in program.layout.layers:
        window = windows[layer.layer]
        if window:
            result.skipped(
                f"layer {layer.layer}", f"has a sliding window of {window} tokens of its own"
            )
        elif any(group.moves or group.owner is not None for group in layer.groups):
            result.skipped(f"layer {layer.layer}", "an earlier pass decided what it keeps")
        else:
            yield layer


def with_policy(program: Program, layer: LayerCache, policy: Policy) -> None:
    """Gives every group of a layer a policy."""
    groups = tuple(replace(group, policy=policy) for group in layer.groups)
    with_layer(program, replace(layer, groups=groups))


def with_layer(program: Program, layer: LayerCache) -> None:
    """Puts a layer's cache in the place of the one that the layout holds."""
    assert program.layout is not None
    program.layout = CacheLayout(
        tuple(layer if old.layer == layer.layer else old for old in program.layout.layers)
    )


def observable(program: Program, result: PassResult, policy: Policy) -> Iterator[LayerCache]:
    """The prunable layers whose attention the runtime can follow, from queries and keys alone."""
    calls = {int(f["layer"]): f for f in map(call_arguments, attention_nodes(program))}
    for layer in prunable(program, result, policy):
        found = calls[layer.layer]
        if found["softcap"]:
            result.skipped(f"layer {layer.layer}", "its logits are capped, which scores leave out")
        elif found["sinks_H"] is not None:
            result.skipped(f"layer {layer.layer}", "has learned sinks, which scores leave out")
        else:
            yield layer
