"""raise_norms: spelled-out RMSNorm and ATen's layer_norm become `einfold` operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.ops import einfold_ops
from ...ir.pattern import Call, Either, Node, Number, match
from ...ir.program import Editor, Program, call_arguments, remove_dead_nodes
from ...ir.weights import Weight
from ..base import Pass, PassResult, place_of

aten = torch.ops.aten

_X = Node("x")
_SQUARE = Either((Call(aten.pow.Tensor_Scalar, _X, Number(value=2)), Call(aten.mul.Tensor, _X, _X)))
_MEAN = Call(aten.mean.dim, _SQUARE, [-1], True)
_BIASED = Call(aten.add.Tensor, _MEAN, Number("eps"))
_INVERSE = Either(
    (Call(aten.rsqrt.default, _BIASED), Call(aten.pow.Tensor_Scalar, _BIASED, Number(value=-0.5)))
)
#: An RMSNorm without its scale.
NORMED = Call(aten.mul.Tensor, _X, _INVERSE)
# Layer normalisation without a bias, as Cohere spells it.
_MEAN_OF_X = Call(aten.mean.dim, _X, [-1], True)
_CENTRED = Call(aten.sub.Tensor, _X, _MEAN_OF_X)
_VARIANCE = Call(aten.mean.dim, Call(aten.pow.Tensor_Scalar, _CENTRED, Number(value=2)), [-1], True)
_STANDARD = Call(
    aten.mul.Tensor,
    _CENTRED,
    Call(aten.rsqrt.default, Call(aten.add.Tensor, _VARIANCE, Number("eps"))),
)
_LAYER_NORMED = Call(aten.mul.Tensor, _STANDARD, Node("weight", where=lambda n: n.op == "get_attr"))

_SCALED = Call(aten.mul.Tensor, NORMED, Node("weight", where=lambda n: n.op == "get_attr"))


@dataclass(frozen=True)
class RaiseNorms(Pass):
    """Raises x * rsqrt(mean(x^2) + eps) * w, with or without w, and layer_norm over the last axis.

    Before: `pow, mean, add, rsqrt, mul, mul`
    After:  `%n = einfold.rms_norm(%x, %w, 1e-06)`
    Source: Zhang and Sennrich 2019 (RMSNorm); Ba et al. 2016 (LayerNorm).
    """

    name = "raise_norms"
    ensures = frozenset({"norms raised"})

    def run(self, program: Program) -> PassResult:
        result, editor = PassResult(), Editor(program)
        for pattern, raise_one in (
            (_LAYER_NORMED, _raise_spelled),
            (_SCALED, _raise_rms),
            (NORMED, _raise_rms),
        ):
            for node in program.nodes(aten.mul.Tensor):
                found = match(pattern, node) if node.users else None
                if found is not None:
                    raise_one(program, editor, node, found, result)
            remove_dead_nodes(program)
        for node in program.nodes(aten.layer_norm.default):
            _raise_layer_norm(program, editor, node, result)
        for node in program.nodes(aten.rsqrt.default):
            result.skipped(
                place_of(node), "a reciprocal square root that is no RMSNorm over the last axis"
            )
        return result


def _raise_rms(
    program: Program, editor: Editor, node: fx.Node, found: dict[str, object], result: PassResult
) -> None:
    x, weight = found["x"], found.get("weight")
    assert isinstance(x, fx.Node)
    width = int(x.meta["val"].shape[-1])
    with editor.before(node):
        if weight is None:
            ones = Weight.of(torch.ones(width))
            weight = editor.weight(f"{x.name}.unit_scale", ones)
        assert isinstance(weight, fx.Node)
        if tuple(weight.meta["val"].shape) != (width,):
            result.skipped(place_of(node), "the scale of the norm is not one number a channel")
            return
        new = editor.call(einfold_ops.rms_norm.default, x, weight, found["eps"])
    result.applied(place_of(new), "rms_norm")
    editor.replace(node, new)


def _raise_spelled(
    program: Program, editor: Editor, node: fx.Node, found: dict[str, object], result: PassResult
) -> None:
    x, weight = found["x"], found["weight"]
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    if tuple(weight.meta["val"].shape) != (x.meta["val"].shape[-1],):
        result.skipped(place_of(node), "the scale of the norm is not one number a channel")
        return
    with editor.before(node):
        zeros = Weight.of(torch.zeros(int(x.meta["val"].shape[-1])))
        bias = editor.weight(f"{weight.target}.zero_bias", zeros)
        new = editor.call(einfold_ops.layer_norm.default, x, weight, bias, found["eps"])
    result.applied(place_of(new), "layer_norm")
    editor.replace(node, new)


def _raise_layer_norm(program: Program, editor: Editor, node: fx.Node, result: PassResult) -> None:
    arguments = call_arguments(node)
    width = int(node.meta["val"].shape[-1])
    if not over_last_axis(node):
        result.skipped(place_of(node), "layer_norm over more than the last axis")
        return
    with editor.before(node):
        weight = arguments["weight"] or editor.weight(
            f"{node.name}.weight", Weight.of(torch.ones(width))
        )
        bias = arguments["bias"] or editor.weight(
            f"{node.name}.bias", Weight.of(torch.zeros(width))
        )
        new = editor.call(
            einfold_ops.layer_norm.default, arguments["input"], weight, bias, arguments["eps"]
        )
    result.applied(place_of(new), "layer_norm")
    editor.replace(node, new)


def over_last_axis(node: fx.Node) -> bool:
    """Whether ATen's layer_norm goes over the last axis alone."""
    return list(call_arguments(node)["normalized_shape"]) == [int(node.meta["val"].shape[-1])]
