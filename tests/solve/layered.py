"""A small model of two layers, to be tuned."""

from __future__ import annotations

import torch
from torch import Tensor

from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.program import Program

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

#: Small, so that attention weighs several tokens, as models do.
WEIGHTS = {
    f"{name}.weight": torch.randn(16, 16, generator=torch.Generator().manual_seed(place)) / 4
    for place, name in enumerate(("w", "o", "w2", "o2"))
}


def inputs_of(text: Tensor) -> dict[str, Tensor]:
    return {
        "input_ids": text,
        "position_ids": torch.arange(text.shape[1]).expand_as(text),
        "logit_rows": torch.arange(text.numel()),
    }


def logits(found: Program, text: Tensor = TEXT, **weights: Tensor) -> Tensor:
    return Interpreter(found, kept=weights).run(inputs_of(text))["logits"]
