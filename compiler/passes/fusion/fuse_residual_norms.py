"""fuse_residual_norms: a residual addition and the norm that follows it become one operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.ops import einfold_ops
from ...ir.program import Editor, Program, remove_dead_nodes
from ..base import Pass, PassResult, place_of

aten = torch.ops.aten

_FUSED = {
    einfold_ops.rms_norm.default: einfold_ops.add_rms_norm.default,
    einfold_ops.layer_norm.default: einfold_ops.add_layer_norm.default,
}


@dataclass(frozen=True)
class FuseResidualNorms(Pass):
    """The sum is both normed and handed on as the next residual.

    Before: `%s = aten.add(%h, %y); %n = rms_norm(%s, %w, eps)`
    After:  `%n, %s = add_rms_norm(%h, %y, %w, eps)`
    """

    name = "fuse_residual_norms"
    requires = frozenset({"norms raised"})

    def run(self, program: Program) -> PassResult:
        result, editor = PassResult(), Editor(program)
        for node in program.nodes(*_FUSED):
            total = node.args[0]
            if not isinstance(total, fx.Node) or total.target is not aten.add.Tensor:
                continue
            left, right = total.args[:2]
            if not _same_type(program, left, right):
                result.skipped(place_of(node), "the addition before the norm broadcasts")
                continue
            if any(
                user is not node and user.target in _FUSED and user.args[0] is total
                for user in total.users
            ):
                result.skipped(place_of(node), "two norms read the same sum")
                continue
            with editor.before(total):
                # The norm's weights are read where they stand first; move them ahead of the sum.
                weights = [
                    editor.read(str(w.target)) for w in node.args[1:] if isinstance(w, fx.Node)
                ]
                rest = [value for value in node.args[1:] if not isinstance(value, fx.Node)]
                fused = editor.call(_FUSED[node.target], left, right, *weights, *rest)  # type: ignore[index]
            normed, summed = editor.results(fused)
            result.applied(place_of(fused), str(_FUSED[node.target]).split(".")[1])  # type: ignore[index]
            editor.replace(node, normed)
            editor.replace(total, summed)
        remove_dead_nodes(program)
        return result


def _same_type(program: Program, left: object, right: object) -> bool:
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return False
    describe = program.shapes.describe
    return describe(left.meta["val"]) == describe(right.meta["val"])
