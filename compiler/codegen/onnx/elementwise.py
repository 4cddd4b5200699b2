"""Lowerings of elementwise ATen operators, in the type to which torch promotes their arguments.

Truth values and short integers are computed in int32 and cast back, which wraps as torch does.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from .lowerings import Context, lowering
from .operands import computed, given, operand, promoted

aten = torch.ops.aten

_ARITHMETIC = {
    aten.add.Tensor: "Add",
    aten.sub.Tensor: "Sub",
    aten.mul.Tensor: "Mul",
    aten.div.Tensor: "Div",
    aten.pow.Tensor_Tensor: "Pow",
    aten.pow.Scalar: "Pow",
    aten.maximum.default: "Max",
    aten.minimum.default: "Min",
}
_FUNCTIONS = {
    aten.exp.default: "Exp",
    aten.log.default: "Log",
    aten.sqrt.default: "Sqrt",
    aten.reciprocal.default: "Reciprocal",
    aten.tanh.default: "Tanh",
    aten.sigmoid.default: "Sigmoid",
    aten.cos.default: "Cos",
    aten.sin.default: "Sin",
    aten.erf.default: "Erf",
}
_WHOLE = {aten.floor.default: "Floor", aten.ceil.default: "Ceil", aten.round.default: "Round"}
_KEEPING = {aten.neg.default: "Neg", aten.abs.default: "Abs"}
_COMPARISONS = {"gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual"}
_COMPARISONS |= {"eq": "Equal", "ne": "Equal"}
_LOGICAL = {
    aten.logical_and.default: "And",
    aten.logical_or.default: "Or",
    aten.logical_xor.default: "Xor",
}
_BITWISE = {
    getattr(getattr(aten, name.format(kind.lower())), overload): kind
    for kind in ("And", "Or", "Xor")
    for name in ("bitwise_{}", "__{}__")
    for overload in ("Tensor", "Scalar")
}


@lowering(*_ARITHMETIC)
def arithmetic(context: Context, node: fx.Node) -> ir.Value:
    dtype = computed(node.meta["val"].dtype)
    left, right = (operand(context, value, dtype) for value in node.args[:2])
    alpha = context.arguments(node).get("alpha", 1)
    if alpha != 1:
        right = context.builder.op("Mul", right, operand(context, alpha, dtype))
    found = context.builder.op(_ARITHMETIC[node.target], left, right)  # type: ignore[index]
    return given(context, found, dtype, node)


@lowering(aten.rsub.Tensor, aten.rsub.Scalar)
def reversed_difference(context: Context, node: fx.Node) -> ir.Value:
    found = context.arguments(node)
    dtype = computed(node.meta["val"].dtype)
    left, right = (operand(context, found[name], dtype) for name in ("self", "other"))
    if found["alpha"] != 1:
        left = context.builder.op("Mul", left, operand(context, found["alpha"], dtype))
    return given(context, context.builder.op("Sub", right, left), dtype, node)


@lowering(*(getattr(getattr(aten, n), kind) for n in _COMPARISONS for kind in ("Tensor", "Scalar")))
def comparison(context: Context, node: fx.Node) -> ir.Value:
    """Of both in the type that they have together: 2 is less than 2.5."""
    left, right = node.args[:2]
    dtype = computed(promoted(left, right))
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    sides = [operand(context, value, dtype) for value in (left, right)]
    found = context.builder.op(_COMPARISONS[name], *sides)
    return context.builder.op("Not", found) if name == "ne" else found


@lowering(*_LOGICAL)
def logical(context: Context, node: fx.Node) -> ir.Value:
    sides = [operand(context, value, torch.bool) for value in node.args[:2]]
    return context.builder.op(_LOGICAL[node.target], *sides)  # type: ignore[index]


@lowering(aten.logical_not.default)
def logical_not(context: Context, node: fx.Node) -> ir.Value:
    return context.builder.op("Not", operand(context, node.args[0], torch.bool))


@lowering(*_BITWISE)
def bitwise(context: Context, node: fx.Node) -> ir.Value:
    dtype = node.meta["val"].dtype
    kind = _BITWISE[node.target]
    sides = [operand(context, value, dtype) for value in node.args[:2]]
    return context.builder.op(kind if dtype == torch.bool else f"Bitwise{kind}", *sides)


@lowering(aten.bitwise_not.default)
def bitwise_not(context: Context, node: fx.Node) -> ir.Value:
    kind = "Not" if node.meta["val"].dtype == torch.bool else "BitwiseNot"
    return context.builder.op(kind, context.value(node.args[0]))


@lowering(*_FUNCTIONS)
def function(context: Context, node: fx.Node) -> ir.Value:
    """A function with fractions as results, of integers too."""
    return context.builder.op(_FUNCTIONS[node.target], _argument(context, node))  # type: ignore[index]


@lowering(*_WHOLE)
def whole(context: Context, node: fx.Node) -> ir.Value:
    """Integers are whole already."""
    x = context.value(node.args[0])
    floating = node.meta["val"].dtype.is_floating_point
    return context.builder.op(_WHOLE[node.target], x) if floating else x  # type: ignore[index]


@lowering(*_KEEPING)
def keeping(context: Context, node: fx.Node) -> ir.Value:
    dtype = computed(node.meta["val"].dtype)
    x = operand(context, node.args[0], dtype)
    return given(context, context.builder.op(_KEEPING[node.target], x), dtype, node)  # type: ignore[index]


@lowering(aten.trunc.default)
def trunc(context: Context, node: fx.Node) -> ir.Value:
    x, dtype, builder = context.value(node.args[0]), node.meta["val"].dtype, context.builder
    if not dtype.is_floating_point:
        return x
    negative = builder.op("Less", x, operand(context, 0, dtype))
    return builder.op("Where", negative, builder.op("Ceil", x), builder.op("Floor", x))


@lowering(aten.sign.default)
def sign(context: Context, node: fx.Node) -> ir.Value:
    """(0 < x) - (x < 0): of NaN it is 0, as in torch."""
    dtype = computed(node.meta["val"].dtype)
    x, zero = operand(context, node.args[0], dtype), operand(context, 0, dtype)
    sides = [context.builder.op("Less", *pair) for pair in ((zero, x), (x, zero))]
    signs = [context.builder.cast(side, dtype) for side in sides]
    return given(context, context.builder.op("Sub", *signs), dtype, node)


@lowering(aten.pow.Tensor_Scalar)
def power(context: Context, node: fx.Node) -> ir.Value:
    """By a product or a square root where torch does so: of -inf they are not what Pow gives."""
    base, exponent = node.args
    dtype = computed(node.meta["val"].dtype)
    x, builder = operand(context, base, dtype), context.builder
    if exponent == 2:
        found = builder.op("Mul", x, x)
    elif exponent in (0.5, -0.5):
        found = builder.op("Sqrt", x)
        found = found if exponent == 0.5 else builder.op("Reciprocal", found)
    else:
        found = builder.op("Pow", x, operand(context, exponent, dtype))
    return given(context, found, dtype, node)


@lowering(aten.relu.default)
def relu(context: Context, node: fx.Node) -> ir.Value:
    dtype = computed(node.meta["val"].dtype)
    x = operand(context, node.args[0], dtype)
    if dtype.is_floating_point:
        return context.builder.op("Relu", x)
    return given(context, context.builder.op("Max", x, operand(context, 0, dtype)), dtype, node)


@lowering(aten.square.default)
def square(context: Context, node: fx.Node) -> ir.Value:
    dtype = computed(node.meta["val"].dtype)
    x = operand(context, node.args[0], dtype)
    return given(context, context.builder.op("Mul", x, x), dtype, node)


@lowering(aten.rsqrt.default)
def rsqrt(context: Context, node: fx.Node) -> ir.Value:
    return context.builder.op("Reciprocal", context.builder.op("Sqrt", _argument(context, node)))


@lowering(aten.silu.default)
def silu(context: Context, node: fx.Node) -> ir.Value:
    x = _argument(context, node)
    return context.builder.op("Mul", x, context.builder.op("Sigmoid", x))


@lowering(aten.gelu.default)
def gelu(context: Context, node: fx.Node) -> ir.Value:
    approximate = context.arguments(node)["approximate"]
    return context.builder.op("Gelu", _argument(context, node), approximate=approximate)


@lowering(aten.clamp.default)
def clamp(context: Context, node: fx.Node) -> ir.Value:
    found = context.arguments(node)
    dtype = computed(node.meta["val"].dtype)
    x = operand(context, found["self"], dtype)
    for key, kind in (("min", "Max"), ("max", "Min")):  # in torch's order; Clip loses NaN
        if found[key] is not None:
            x = context.builder.op(kind, x, operand(context, found[key], dtype))
    return given(context, x, dtype, node)


@lowering(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(context: Context, node: fx.Node) -> ir.Value:
    x, mask, value = node.args
    return _choose(context, node, mask, value, x)


@lowering(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(context: Context, node: fx.Node) -> ir.Value:
    return _choose(context, node, *node.args)


def _choose(context: Context, node: fx.Node, condition: Any, left: Any, right: Any) -> ir.Value:
    dtype = computed(node.meta["val"].dtype)
    sides = [operand(context, value, dtype) for value in (left, right)]
    chosen = context.builder.op("Where", operand(context, condition, torch.bool), *sides)
    return given(context, chosen, dtype, node)


@lowering(aten._to_copy.default)
def cast(context: Context, node: fx.Node) -> ir.Value:
    return context.builder.cast(context.value(node.args[0]), node.meta["val"].dtype)


def _argument(context: Context, node: fx.Node) -> ir.Value:
    """The one argument, in the type of the result."""
    return operand(context, node.args[0], node.meta["val"].dtype)
