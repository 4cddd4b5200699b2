"""Head-wise pruning: some KV heads keep all, the others a window."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ...ir.kv.keep.window import Window
from ...ir.kv.layout import HeadGroup, LayerCache
from ...ir.program import Program
from ..base import PassResult
from .layers import with_layer

#: A KV head of the model: (layer, head).
Head = tuple[int, int]


def heads_of(layers: Sequence[LayerCache]) -> list[Head]:
    """All KV heads of some layers."""
    return [(layer.layer, head) for layer in layers for head in range(layer.kv_heads)]


def keep_whole(
    program: Program,
    layers: Sequence[LayerCache],
    kept: Collection[Head],
    window: Window,
    result: PassResult,
) -> None:
    """Gives the heads of layers that are not `kept` a window, and says so."""
    for layer in layers:
        heads = tuple(head for head in range(layer.kv_heads) if (layer.layer, head) in kept)
        _split(program, layer, heads, window)
        where, others = f"layer {layer.layer}", layer.kv_heads - len(heads)
        if not others:
            result.skipped(where, "all of its KV heads keep all")
            continue
        result.applied(
            where,
            f"{len(heads)} of {layer.kv_heads} KV heads keep all; {others} keep {window.says()}",
        )


def _split(program: Program, layer: LayerCache, full: tuple[int, ...], window: Window) -> None:
    """Gives the heads that are not in `full` a window, in a group of their own."""
    (group,) = layer.groups
    rest = tuple(head for head in range(layer.kv_heads) if head not in full)
    groups: list[HeadGroup] = []
    if full:
        groups.append(replace(group, heads=full))
    if rest:
        groups.append(replace(group, heads=rest, policy=window))
    with_layer(program, replace(layer, groups=tuple(groups)))
