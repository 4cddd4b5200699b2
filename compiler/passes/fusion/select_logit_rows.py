"""select_logit_rows: the head of the model runs on the token rows that are asked for, not on all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.ops import einfold_ops
from ...ir.program import Editor, Program
from ..base import Pass, PassResult, place_of

#: Operators that may stand between the head's product and the logits (Gemma 2 caps them).
_ELEMENTWISE = {
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.div.Tensor,
    torch.ops.aten.tanh.default,
    torch.ops.aten.add.Tensor,
}


@dataclass(frozen=True)
class SelectLogitRows(Pass):
    """Adds the input `logit_rows` [N]; logits become [N, V] for rows b*S + s of the batch.

    Before: `%l = linear(%h, %head)                       : f32[B, S, V]`
    After:  `%r = select_rows(%h, %logit_rows); %l = linear(%r, %head)  : f32[N, V]`
    A decode step or a prefill chunk then computes one row, and an evaluation all of them.
    """

    name = "select_logit_rows"
    requires = frozenset({"linears raised"})

    def run(self, program: Program) -> PassResult:
        result, editor = PassResult(), Editor(program)
        names, values = program.output_names(), list(program.output.args[0])  # type: ignore[arg-type]
        if not program.is_sequence_model() or "logits" not in names:
            result.skipped("output", "no logits among the outputs")
            return result
        chain = _chain_to_head(values[names.index("logits")])
        if chain is None:
            result.skipped("output", "no linear head behind the logits: all rows are computed")
            return result
        rows = editor.input("logit_rows", ["N"], torch.int64)
        head = chain[0]
        with editor.before(head):
            picked = editor.call(einfold_ops.select_rows.default, head.args[0], rows)
        old, new = head.args[0], picked
        for node in chain:
            with editor.before(node):
                args = [new if argument is old else argument for argument in node.args]
                old, new = node, editor.call(node.target, *args, **node.kwargs)  # type: ignore[arg-type]
        values[names.index("logits")] = new
        editor.set_output(values, names)
        for node in reversed(chain):
            program.graph.erase_node(node)
        result.applied(place_of(head), "the head computes the rows that are asked for")
        return result


def _chain_to_head(logits: object) -> list[fx.Node] | None:
    """The nodes from the head's linear to the logits, in order."""
    chain: list[fx.Node] = []
    node = logits
    while isinstance(node, fx.Node):
        chain.insert(0, node)
        if node.target is einfold_ops.linear.default:
            return chain
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if node.target not in _ELEMENTWISE or len(sources) != 1:
            return None
        node = sources[0]
    return None
