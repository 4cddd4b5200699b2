"""explicit_zeros: zero points that the packed format implies are written out, for standard ONNX."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...ir.ops import einfold_ops
from ...ir.program import Editor, Program, call_arguments
from ...ir.quant.pack import pack_bits
from ...ir.weights import derive
from ..base import Pass, PassResult

#: Operators with packed weights: (scales argument, zeros argument) pairs.
_ARGUMENTS = {
    einfold_ops.quantized_linear.default: [("scales", "zeros")],
    einfold_ops.quantized_experts.default: [
        ("gate_up_scales", "gate_up_zeros"),
        ("down_scales", "down_zeros"),
    ],
}


@dataclass(frozen=True)
class ExplicitZeros(Pass):
    """DequantizeLinear takes an absent zero point for 0; ours is 2^(bits-1).

    Before: `quantized_linear(%x, %w.packed, %w.scales, none, none, 4, 32)`
    After:  `quantized_linear(%x, %w.packed, %w.scales, %w.zeros, none, 4, 32)`
    """

    name = "explicit_zeros"

    def run(self, program: Program) -> PassResult:
        result, editor = PassResult(), Editor(program)
        for node in program.nodes(*_ARGUMENTS):
            names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
            for scales_name, zeros_name in _ARGUMENTS[node.target]:  # type: ignore[index]
                found = call_arguments(node)
                scales = str(found[scales_name].target)
                if program.weights[scales].shape[-1] * int(found["bits"]) % 8:
                    result.skipped(
                        scales,
                        "an odd number of groups: ONNX packs zero points across rows; the code "
                        "generator writes a constant",
                    )
                elif found[zeros_name] is None:
                    zeros = self._zeros(
                        program, editor, node, found[scales_name], int(found["bits"])
                    )
                    node.update_arg(names.index(zeros_name), zeros)
                    added = program.weights[str(zeros.target)].nbytes
                    result.applied(scales, "zero points written out", -added)
        return result

    def _zeros(
        self, program: Program, editor: Editor, node: fx.Node, scales: fx.Node, bits: int
    ) -> fx.Node:
        name = str(scales.target).removesuffix(".scales") + ".zeros"
        *lead, groups = program.weights[str(scales.target)].shape
        shape = (*lead, math.ceil(groups * bits / 8))

        def compute() -> tuple[Tensor]:
            return (pack_bits(torch.full((*lead, groups), 1 << (bits - 1)), bits),)

        with editor.before(node):
            if name in program.weights:
                return editor.read(name)
            return editor.weight(name, derive([(shape, torch.uint8)], compute)[0])
