"""rotate_down: what a down projection reads is turned by an orthogonal matrix as the model runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...ir.ops import einfold_ops
from ...ir.ops.channels import MixChannels
from ...ir.program import Editor, Program, remove_dead_nodes
from ...ir.quant.orthogonal import signed_factors, turned_by
from ...ir.weights import Weight
from ..base import Pass, PassResult, place_of
from .turning import NotTurnedError, change_weight, check_alone, check_type, check_width

aten = torch.ops.aten

#: What a down projection reads: the activation of an MLP, gated or not.
_ACTIVATIONS = {
    einfold_ops.gated_activation.default,
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
}


@dataclass(frozen=True)
class RotateDown(Pass):
    """Turns what the linear behind the activation of an MLP reads, x -> x Q, and that linear's columns.

    Before: `%h = gated_activation(%g, %u, "silu"); %y = linear(%h, %w, %b)`
    After:  `%t = mix_channels(%h, %a, %b); %y = linear(%t, %w.turned, %b)`

    No linear makes %h, so that no weight could take its turning: two small matrices do it as the model
    runs, of 24 and 64 channels for 1,536 (`ir/quant/orthogonal.py`, with the signs in the matrices). All
    layers of a width share them, and where several linears read one activation, it is turned once.

    Source: QuaRot (Ashkboos et al. 2024, section 4, stage 1b), R4 of SpinQuant (Liu et al. 2024). Different
    from them: two dense products take the place of the fast transform, and experts, whose activations are
    within one operator, are left.
    """

    name = "rotate_down"
    requires = frozenset({"linears raised"})

    def run(self, program: Program) -> PassResult:
        result, editor = PassResult(), Editor(program)
        done: dict[fx.Node, fx.Node] = {}
        for node in program.nodes(einfold_ops.linear.default):
            x = node.args[0]
            assert isinstance(x, fx.Node)
            if not _activated(x):
                continue
            place, width = place_of(node), int(x.meta["val"].shape[-1])
            try:
                check_width(width)
                check_type(x)
                check_alone(program, node, "weight_NM")
            except NotTurnedError as reason:
                result.skipped(place, f"it reads its inputs as they are: {reason}")
                continue
            if x not in done:
                with editor.before(node):
                    done[x] = _mixed(editor, x, width)
            node.replace_input_with(x, done[x])
            change_weight(editor, node, "weight_NM", _columns_turned(width))
            outer, inner = (len(matrix) for matrix in signed_factors(width))
            result.applied(
                place, f"its {width} inputs turned, by matrices of {outer} and {inner} channels"
            )
        for node in program.nodes(einfold_ops.experts.default):
            result.skipped(place_of(node), "what experts' down projections read is within them")
        if not result.notes:
            result.skipped("graph", "no linear reads the activation of an MLP")
        remove_dead_nodes(program)
        return result


def _activated(value: fx.Node) -> bool:
    """Whether a value is an activation, or its square, in whatever shape."""
    while value.target in (aten.reshape.default, aten.pow.Tensor_Scalar):
        before = value.args[0]
        assert isinstance(before, fx.Node)
        if before.meta["val"].shape[-1] != value.meta["val"].shape[-1]:
            return False
        value = before
    return value.target in _ACTIVATIONS


def _mixed(editor: Editor, value: fx.Node, width: int) -> fx.Node:
    """A value's rows, mixed by two matrices; all values of a width read the same two."""
    reads = {}
    for name, matrix in zip(("outer", "inner"), signed_factors(width), strict=True):
        known = f"down.{width}.{name}"
        if known in editor.program.weights:
            reads[name] = editor.read(known)
        else:
            reads[name] = editor.weight(known, Weight.of(matrix.float()))
    return editor.make(MixChannels, x=value, **reads)


def _columns_turned(width: int) -> Callable[[Tensor], Tensor]:
    return lambda weight: turned_by(weight, *signed_factors(width))
