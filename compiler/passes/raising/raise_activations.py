"""raise_activations: spelled-out GELU, and the gate of a gated MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.ops import einfold_ops
from ...ir.pattern import Call, Node, Number, match
from ...ir.program import Editor, Program, remove_dead_nodes
from ..base import Pass, PassResult, place_of

aten = torch.ops.aten

_X = Node("x")
_CUBE = Call(
    aten.mul.Tensor, Call(aten.pow.Tensor_Scalar, _X, Number(value=3)), Number(value=0.044715)
)
_INNER = Call(aten.mul.Tensor, Call(aten.add.Tensor, _X, _CUBE), Number(value=0.7978845608))
_GELU_TANH = Call(
    aten.mul.Tensor,
    Call(aten.mul.Tensor, _X, Number(value=0.5)),
    Call(aten.add.Tensor, Call(aten.tanh.default, _INNER), Number(value=1)),
)

_ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default)


@dataclass(frozen=True)
class RaiseActivations(Pass):
    """Raises GELU's tanh form (Hendrycks and Gimpel 2016), then activation(gate) * up.

    Before: `%s = aten.silu(%g); %m = aten.mul(%s, %u)`
    After:  `%m = einfold.gated_activation(%g, %u, "silu")`
    """

    name = "raise_activations"

    def run(self, program: Program) -> PassResult:
        result, editor = PassResult(), Editor(program)
        for node in program.nodes(aten.mul.Tensor):
            found = match(_GELU_TANH, node)
            if found is not None:
                with editor.before(node):
                    new = editor.call(aten.gelu.default, found["x"], approximate="tanh")
                result.applied(f"%{node.name}", "gelu (tanh)")
                editor.replace(node, new)
        for node in program.nodes(aten.mul.Tensor):
            self._raise_gate(program, editor, node, result)
        remove_dead_nodes(program)
        return result

    def _raise_gate(
        self, program: Program, editor: Editor, node: fx.Node, result: PassResult
    ) -> None:
        found = match(Call(aten.mul.Tensor, Call(_ACTIVATIONS, Node("gate")), Node("up")), node)
        if found is None:
            return
        gate, up = found["gate"], found["up"]
        if program.shapes.describe(gate.meta["val"]) != program.shapes.describe(up.meta["val"]):
            return
        activation = next(
            a for a in node.args if isinstance(a, fx.Node) and a.target in _ACTIVATIONS
        )
        with editor.before(node):
            new = editor.call(einfold_ops.gated_activation.default, gate, up, _kind(activation))
        result.applied(place_of(gate), f"gated_activation ({_kind(activation)})")
        editor.replace(node, new)


def _kind(activation: fx.Node) -> str:
    if activation.target is aten.silu.default:
        return "silu"
    if activation.target is aten.relu.default:
        return "relu"
    return "gelu_tanh" if activation.kwargs.get("approximate", "none") == "tanh" else "gelu"
