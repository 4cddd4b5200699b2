"""store_half: weights are kept in float16 and widened where they are used."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...ir.program import Editor, Program
from ...ir.weights import Weight
from ..base import Pass, PassResult


@dataclass(frozen=True)
class StoreHalf(Pass):
    """Float16 as a storage format: half the bytes on disk, the same float32 arithmetic.

    Before: `%w = read "w" : f32[..]`
    After:  `%h = read "w.half" : f16[..]; %w = aten._to_copy(%h, dtype=f32)`
    Norm scales, biases and rotary tables (one-dimensional, or read as positions) stay in float32: they
    are few and their rounding is felt everywhere.
    """

    name = "store_half"

    def run(self, program: Program) -> PassResult:
        result, editor = PassResult(), Editor(program)
        for node in list(program.graph.nodes):
            weight = program.weight_of(node)
            if weight is None or weight.dtype != torch.float32 or len(weight.shape) < 2:
                continue
            name = str(node.target)
            if name.startswith("rotary."):
                continue
            with editor.after(node):
                half = editor.weight(f"{name}.half", _halved(name, weight))
            with editor.after(half):
                wide = editor.call(torch.ops.aten._to_copy.default, half, dtype=torch.float32)
            editor.replace(node, wide)
            program.weights.discard(name)
            result.applied(name, "stored in float16", weight.nbytes // 2)
        return result


def _halved(name: str, weight: Weight) -> Weight:
    return Weight(weight.shape, torch.float16, lambda: weight.load().half())
