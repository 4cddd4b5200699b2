"""A small model of two layers, to be tuned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.program import Program
from einfold.compiler.solve.tuning import Span, layers

from ..calibrate.common import BODY, TEXT

#: Two layers, each with linears in front of its attention and behind it, and what they add up.
BLOCKS = (
    BODY.replace(
        "    weight @w.weight : f32[16, 16]",
        "".join(f"    weight @{n}.weight : f32[16, 16]\n" for n in ("w", "o", "w2", "o2")),
    )
    .replace(
        "    call %k2 =",
        """    call %f1 = aten.flatten.using_ints(%o, -2, -1) : f32[B, S, 16]
    read %ow "o.weight" : f32[16, 16]
    call %y1 = einfold.linear(%f1, %ow, none) : f32[B, S, 16]
    call %h1 = aten.add.Tensor(%h, %y1) : f32[B, S, 16]
    read %w2 "w2.weight" : f32[16, 16]
    call %x2 = einfold.linear(%h1, %w2, none) : f32[B, S, 16]
    call %v2 = aten.unflatten.int(%x2, -1, [4, 4]) : f32[B, S, 4, 4]
    call %k2 =""",
    )
    .replace("rotary(%o, %pos", "rotary(%v2, %pos")
    .replace("attention(%k2, %k2, %o, none", "attention(%k2, %k2, %v2, none")
    .replace(
        "    call %r = einfold.select_rows(%f, %rows)",
        """    read %ow2 "o2.weight" : f32[16, 16]
    call %y2 = einfold.linear(%f, %ow2, none) : f32[B, S, 16]
    call %h2 = aten.add.Tensor(%h1, %y2) : f32[B, S, 16]
    call %r = einfold.select_rows(%h2, %rows)""",
    )
)

#: The same with a norm in front of the second, in one call with the sum that it is of.
FUSED = (
    BLOCKS.replace(
        "    weight @w.weight",
        "    weight @g : f32[16]\n    weight @b : f32[16]\n    weight @w.weight",
    )
    .replace(
        "call %h1 = aten.add.Tensor(%h, %y1) : f32[B, S, 16]",
        """read %g "g" : f32[16]
    read %b "b" : f32[16]
    call %t1 = einfold.add_layer_norm(%h, %y1, %g, %b, 1e-05) : (f32[B, S, 16], f32[B, S, 16])
    call %n1 = builtin.getitem(%t1, 0) : f32[B, S, 16]
    call %h1 = builtin.getitem(%t1, 1) : f32[B, S, 16]""",
    )
    .replace("linear(%h1, %w2", "linear(%n1, %w2")
)

#: Small, so that attention weighs several tokens, as models do.
WEIGHTS = {
    f"{name}.weight": torch.randn(16, 16, generator=torch.Generator().manual_seed(place)) / 4
    for place, name in enumerate(("w", "o", "w2", "o2"))
}


def layers_behind(name: str) -> Callable[[Program], list[Span]]:
    """Finds the two layers, the first of which ends behind a node."""

    def found(program: Program) -> list[Span]:
        nodes, stop = [*program.graph.nodes], layers(program)[1].stop
        at = next(place for place, node in enumerate(nodes) if node.name == name) + 1
        end = nodes.index(stop)
        return [Span(nodes[0], nodes[at], (*nodes[:at],)), Span(nodes[at], stop, (*nodes[at:end],))]

    return found


def inputs_of(text: Tensor) -> dict[str, Tensor]:
    return {
        "input_ids": text,
        "position_ids": torch.arange(text.shape[1]).expand_as(text),
        "logit_rows": torch.arange(text.numel()),
    }


def logits(found: Program, text: Tensor = TEXT, **weights: Tensor) -> Tensor:
    return Interpreter(found, kept=weights).run(inputs_of(text))["logits"]
