"""The operators that a graph text may call: einfold's own, and those of `aten` that do nothing but compute.

A graph comes with an artifact, from anybody. So what it may call is a list, by overload: what the compiler
emits for the models that it knows, and neighbours of the same kind (elementwise, views, reductions, sorting,
gathering with checked indices, products of matrices). Left out, and so refused, is all else that torch puts
into the namespace: what reads files, writes into its arguments (`add_`, `add.out`), skips the checks of its
indices (`segment_reduce(unsafe)`, `_unsafe_index`), sees memory that it did not make (`set_`, `as_strided`,
`empty`), draws random numbers, works on strings or on Python objects, or ends the process for some integers
(`fmod`, `floor_divide` of the smallest one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import IRError, UnsupportedError
from .ops.record import operator_of
from .program import BUILTINS, Program, op_name

_ONE = (
    "abs acos acosh asin asinh atan atanh bitwise_not ceil cos cosh erf erfc erfinv exp exp2 expm1 "
    "floor frac isfinite isinf isnan log log10 log1p log2 logical_not neg reciprocal relu round rsqrt "
    "sgn sigmoid sign signbit sin sinc sinh sqrt square tan tanh trunc"
)
_ACTIVATIONS = (
    "celu elu gelu glu hardsigmoid hardswish hardtanh leaky_relu log_sigmoid mish relu6 selu silu "
    "softplus hardshrink softshrink prelu"
)
_TWO = (
    "add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar rsub.Tensor mul.Tensor mul.Scalar "
    "div.Tensor div.Scalar pow.Tensor_Tensor pow.Tensor_Scalar pow.Scalar maximum minimum fmax fmin "
    "atan2 eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor "
    "gt.Scalar ge.Tensor ge.Scalar logical_and logical_or logical_xor bitwise_and.Tensor "
    "bitwise_and.Scalar bitwise_or.Tensor bitwise_or.Scalar bitwise_xor.Tensor bitwise_xor.Scalar "
    "where.self where.ScalarSelf where.ScalarOther where.Scalar masked_fill.Scalar masked_fill.Tensor "
    "clamp clamp.Tensor clamp_min clamp_min.Tensor clamp_max clamp_max.Tensor lerp.Scalar lerp.Tensor "
    "addcmul addcdiv hypot logaddexp"
)
_REDUCTIONS = (
    "sum sum.dim_IntList mean mean.dim prod prod.dim_int amax amin max min max.dim min.dim argmax "
    "argmin any any.dim any.dims all all.dim all.dims var.correction var_mean.correction "
    "std.correction logsumexp norm.ScalarOpt_dim linalg_vector_norm cumsum cumprod softmax.int "
    "log_softmax.int _softmax _log_softmax count_nonzero.dim_IntList layer_norm"
)
_VIEWS = (
    "reshape view expand transpose.int permute t squeeze squeeze.dim squeeze.dims unsqueeze "
    "flatten.using_ints unflatten.int select.int slice.Tensor narrow split.Tensor split_with_sizes "
    "chunk unbind.int cat stack repeat_interleave.self_int flip roll tril triu diagonal movedim.int "
    "clone contiguous _to_copy lift_fresh_copy constant_pad_nd repeat expand_as reshape_as"
)
_PICKING = (
    "embedding index.Tensor index_select gather scatter.src scatter.value scatter_add index_put "
    "index_add index_copy index_fill.int_Scalar topk sort sort.stable argsort select_scatter "
    "slice_scatter"
)
_PRODUCTS = "mm bmm matmul addmm baddbmm mv dot linear outer scaled_dot_product_attention"
_MAKING = (
    "arange arange.start arange.start_step full full_like zeros zeros_like ones ones_like new_full "
    "new_zeros new_ones scalar_tensor eye sym_size.int"
)

#: The overloads of `aten` as torch names them, such as `aten.add.Tensor`.
ALLOWED = frozenset(
    f"aten.{name}" if "." in name else f"aten.{name}.default"
    for group in (
        _ONE,
        _ACTIVATIONS,
        _TWO,
        _REDUCTIONS,
        _VIEWS,
        _PICKING,
        _PRODUCTS,
        _MAKING,
    )
    for name in group.split()
)

#: Arguments that speak of places in memory; the IR has none.
_PLACES = {"device", "layout", "pin_memory", "memory_format", "non_blocking", "out", "generator"}

#: The place of `dropout_p` among the arguments of attention.
_DROPOUT = 4


def is_allowed(target: object) -> bool:
    """Whether a graph text may call this operator."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target) in ALLOWED or operator_of(target) is not None
    return any(target is function for function in BUILTINS.values())


def check_call(target: object, args: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    """Raises IRError for a call that a graph text may not hold."""
    if not is_allowed(target):
        raise IRError(f"{op_name(target)} is not among the operators that an artifact may call")
    for name in sorted(_PLACES & set(keywords)):
        raise IRError(f"{op_name(target)} is told of its {name!r}, and a graph has none")
    dropout = [keywords.get("dropout_p", 0.0), *args[_DROPOUT : _DROPOUT + 1]]
    if target is torch.ops.aten.scaled_dot_product_attention.default and any(dropout):
        raise IRError(f"{op_name(target)} with dropout draws random numbers")


def check_allowed(program: Program) -> None:
    """Raises UnsupportedError, naming the operator, for a graph that no artifact may hold."""
    for node in program.graph.nodes:
        if node.op == "call_function" and not is_allowed(node.target):
            raise UnsupportedError(
                f"the model calls {op_name(node.target)} at %{node.name}, which is not among the "
                "operators that an artifact may call (compiler/ir/allowed.py); einfold.export_onnx with "
                "example inputs takes more"
            )
