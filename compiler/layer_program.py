"""One layer's attention over its cache, as a program of its own: for callers that bring q, k and v."""

from __future__ import annotations

import torch
from torch import fx

from .ir.kv.layout import CacheLayout
from .ir.ops import einfold_ops
from .ir.program import Editor, Program, attention_nodes, call_arguments
from .passes.cache.attach_cache import AttachCache


def layer_programs(planned: Program) -> dict[int, Program]:
    """A program a layer of a program whose cache is planned and not attached yet.

    Inputs: `q` [B, S, H, D], `k` and `v` [B, S, K, D], rotated where the model rotates them; `sinks` [H]
    where the model has them; counters and buffers as `attach_cache` names them. Results: `out` [B, S, H, D],
    and what a step of the whole graph gives for this layer.
    """
    return {
        int(call_arguments(node)["layer"]): _layer_program(planned, node)
        for node in attention_nodes(planned)
    }


def _layer_program(planned: Program, node: fx.Node) -> Program:
    found = call_arguments(node)
    layer = int(found["layer"])
    assert planned.layout is not None
    program = Program(planned.model)
    program.layout = CacheLayout((planned.layout[layer],))
    prefix = f"cache.{layer}."
    program.cache_weights = {
        name: weight for name, weight in planned.cache_weights.items() if name.startswith(prefix)
    }
    editor = Editor(program)
    names = (("q", "q_BSHD"), ("k", "k_BSKD"), ("v", "v_BSKD"))
    inputs = [
        editor.input(
            name, ["B", "S", *map(int, found[argument].meta["val"].shape[2:])], torch.float32
        )
        for name, argument in names
    ]
    sinks = found["sinks_H"]
    if sinks is not None:
        sinks = editor.input("sinks", list(map(int, sinks.meta["val"].shape)), torch.float32)
    out = editor.call(
        einfold_ops.attention.default,
        *inputs,
        sinks,
        *(found[name] for name in ("layer", "scale", "window", "softcap")),
    )
    editor.set_output([out], ["out"])
    AttachCache().run(program)
    return program
