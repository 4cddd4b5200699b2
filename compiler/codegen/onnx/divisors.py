"""What an ONNX model may divide by.

Processors raise a signal where a whole number is divided by 0, or the smallest one by -1, so division of
whole numbers needs a constant above 0. Fractions divide by anything. Which values are fractions is followed
from the inputs and weights on; a value whose name is given twice (in a graph of an `If`) is not trusted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

#: ONNX's numbers of int32 and int64, and of float32, float16, float64 and bfloat16.
_WHOLE, _FRACTIONS = (6, 7), (1, 10, 11, 16)

#: Operators that take and give nothing but fractions.
_ALWAYS = (
    "Acos Acosh Asin Asinh Atan Atanh Attention BiasGelu Celu Cos Cosh DequantizeLinear Elu Erf Exp FastGelu "
    "Gelu GroupQueryAttention HardSigmoid HardSwish LayerNormalization Log LogSoftmax MatMulIntegerToFloat "
    "MatMulNBits Mish MultiHeadAttention QuickGelu RMSNormalization Reciprocal RotaryEmbedding Selu Sigmoid "
    "SimplifiedLayerNormalization Sin Sinh SkipLayerNormalization SkipSimplifiedLayerNormalization Softmax "
    "Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
)

#: Operators whose first result is of the type of their first input.
_AS_FIRST = (
    "Abs Add Ceil Clip Concat CumSum Div Einsum Expand Flatten Floor FusedMatMul Gather GatherElements "
    "GatherND Gemm Identity LeakyRelu MatMul Max Mean Min Mod Mul Neg PRelu Pad Pow ReduceL1 ReduceL2 "
    "ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu "
    "Reshape Round ScatterElements ScatterND Sign Slice Split Squeeze Sub Sum TensorScatter Tile TopK "
    "Transpose Trilu Unsqueeze"
)
_FRACTIONAL = frozenset(_ALWAYS.split())
_AS_INPUT = dict.fromkeys(_AS_FIRST.split(), 0) | {"CastLike": 1, "Where": 1}

#: Operators that divide.
_DIVIDE = ("Div", "Mod")


def undivided(graph: Any) -> Iterator[str]:
    """The operators that divide whole numbers by what is no constant above 0, as far as can be seen."""
    given = Counter(_names(graph))
    yield from _undivided(
        graph, {name for name, count in given.items() if count == 1}, set(), set()
    )


def _undivided(graph: Any, once: set[str], fractions: set[str], above: set[str]) -> Iterator[str]:
    """Goes on with the names of fractions and of constants above 0 that the graphs around this one give."""
    fractions |= {
        value.name for value in graph.input if value.type.tensor_type.elem_type in _FRACTIONS
    } & once
    for tensor in graph.initializer:
        if tensor.name in once and tensor.data_type in _FRACTIONS:
            fractions.add(tensor.name)
        elif tensor.name in once and tensor.data_type in _WHOLE and _above_zero(tensor):
            above.add(tensor.name)
    for node in graph.node:
        if (
            node.op_type in _DIVIDE
            and not fractions.intersection(node.input[:1])
            and not above.intersection(node.input[1:2])
        ):
            yield node.op_type
        inside = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        for each in inside:
            yield from _undivided(each, once, fractions, above)
        if node.op_type == "If":  # whichever of them runs
            for at, name in enumerate(node.output):
                results = {each.output[at].name for each in inside if at < len(each.output)}
                if len(results) == len(inside) and results <= fractions and name in once:
                    fractions.add(name)
        if _gives_fractions(node, fractions):
            fractions |= set(node.output if node.op_type == "Split" else node.output[:1]) & once


def _gives_fractions(node: Any, fractions: set[str]) -> bool:
    """Whether a node's first result is of fractions."""
    number = _AS_INPUT.get(node.op_type)
    if number is not None:
        return len(node.input) > number and node.input[number] in fractions
    if node.op_type == "Cast":
        return any(entry.name == "to" and entry.i in _FRACTIONS for entry in node.attribute)
    if node.op_type == "Constant":
        return any(entry.t.data_type in _FRACTIONS for entry in node.attribute)
    return node.op_type in _FRACTIONAL


def _names(graph: Any) -> Iterator[str]:
    """What a graph and those in it give names to."""
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    for node in graph.node:
        yield from node.output
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _names(attribute.g)


def _above_zero(tensor: Any) -> bool:
    from onnx import numpy_helper

    return (
        not tensor.external_data
        and math.prod(tensor.dims) <= 64
        and bool((numpy_helper.to_array(tensor) > 0).all())
    )
