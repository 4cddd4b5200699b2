"""round_activations: what linears over integers read is rounded to 8 bits: their products are of integers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...ir.ops import einfold_ops
from ...ir.ops.rounding import RoundToInt8
from ...ir.program import Editor, Program, call_arguments
from ...ir.quant.scheme import read_scheme
from ..base import Pass, PassResult, place_of
from .quantize_weights import head_of

_LINEARS = tuple(
    getattr(einfold_ops, name).default for name in ("linear", "quantized_linear", "stored_linear")
)


@dataclass(frozen=True)
class RoundActivations(Pass):
    """Rounds the inputs of linears whose weights are integers with one scale a row; once where several read.

    Before: `%y = stored_linear(%x, [%w.packed, %w.scales], %b, "grouped(bits=8,block=0,..)", [96, 64])`
    After:  `%r = round_to_int8(%x); %y = stored_linear(%r, [..], %b, "grouped(bits=8,block=0,..)", [96, 64])`

    The head of a language model reads its inputs as they are, and so do experts: their inner activations are
    within one operator.

    Source: SmoothQuant (Xiao et al. 2023, section 4) for W8A8, QServe (Lin et al. 2024, section 4) for W4A8.
    Different: channels are scaled by solvers of weights (`awq`, `gptq`), or not at all; attention's own
    products stay in floats.
    """

    name = "round_activations"
    requires = frozenset({"linears raised"})

    def run(self, program: Program) -> PassResult:
        result, editor = PassResult(), Editor(program)
        head = head_of(program, *_LINEARS)
        done: dict[fx.Node, fx.Node] = {}
        for node in list(program.nodes(*_LINEARS)):
            reason = "the head reads its inputs as they are" if node is head else _reason(node)
            if reason:
                result.skipped(place_of(node), reason)
                continue
            x = call_arguments(node)["x"]
            if x not in done:
                with editor.before(node):
                    done[x] = editor.make(RoundToInt8, x=x)
            node.replace_input_with(x, done[x])
            result.applied(place_of(node), "inputs in 8 bits, a scale a row")
        for node in program.nodes(einfold_ops.stored_experts.default):
            result.skipped(place_of(node), "experts read their inputs as they are")
        return result


def _reason(node: fx.Node) -> str:
    """Why the inputs of a linear stay as they are; "" where they are rounded."""
    found = call_arguments(node)
    if "scheme" in found and read_scheme(found["scheme"]).integer_rows:
        return ""
    return "its weight is no integers with one scale a row"
