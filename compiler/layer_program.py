"""One layer's attention over its cache, as a program of its own: for callers that bring q, k and v."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..errors import IRError
from .ir.kv.layout import CacheLayout
from .ir.ops import einfold_ops
from .ir.parser import parse
from .ir.printer import print_program
from .ir.program import Editor, Program, attention_nodes, call_arguments
from .ir.weights import Weight
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


def packed(program: Program) -> dict[str, Any]:
    """A program as plain data: its text, and its weights as tensors by name."""
    weights = {name: program.weights[name].load() for name in program.weights}
    return {"program": print_program(program), "weights": weights}


def unpacked(data: dict[str, Any]) -> Program:
    """The program that `packed` told; raises IRError for text or weights that are none."""
    weights: dict[str, torch.Tensor] = data["weights"]

    def load(name: str, declared: Weight) -> Weight:
        found = weights[name]
        if (tuple(found.shape), found.dtype) != (declared.shape, declared.dtype):
            raise IRError(f"weight {name!r} is {found.dtype}{tuple(found.shape)}")
        return Weight.of(found)

    return parse(data["program"], load)
