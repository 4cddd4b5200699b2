"""ATen operators that compute: casts, reductions, contractions, losses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from ...ir.cascade.expr import Const, apply
from . import contractions, losses, reductions
from .context import Value
from .ranks import NotExpressedError
from .registry import Call, handles


@handles("_to_copy", "to", "type_as", "float", "half", "bfloat16", "double")
def _cast(call: Call) -> Value:
    value: Value = call.self
    narrow = {torch.float16: "f16", torch.bfloat16: "bf16"}.get(call.dtype)
    if call.kind == value.kind == "real":
        return replace(value, expr=apply(narrow, value.expr)) if narrow else value
    if value.kind == "bool":
        return replace(value, expr=apply("where", value.expr, 1.0, 0.0), kind=call.kind)
    if call.kind == "bool":
        return replace(value, expr=apply("ne", value.expr, 0.0), kind="bool")
    if call.kind == "integer" and value.kind == "real":
        return replace(value, expr=apply("trunc", value.expr), kind="integer")
    return replace(value, kind=call.kind)


@handles("sum", "any")
def _sum(call: Call) -> Value:
    op = "max" if call.operator == "any" else "sum"
    dims = reductions.dims_of(call.self, call.dim)
    return call.context.reduce(call.name, op, call.self, dims, bool(call.keepdim))


@handles("amax", "amin", "max", "min")
def _extreme(call: Call) -> Any:
    if call.other is not None:
        raise NotExpressedError("a maximum of two tensors")
    dims = reductions.dims_of(call.self, call.dim)
    op = call.operator.removeprefix("a")
    found = call.context.reduce(call.name, op, call.self, dims, bool(call.keepdim))
    return (found, None) if call.operator in ("max", "min") and call.dim is not None else found


@handles("mean")
def _mean(call: Call) -> Value:
    dims = reductions.dims_of(call.self, call.dim)
    return reductions.mean(call.context, call.name, call.self, dims, bool(call.keepdim))


@handles("var", "std", "var_mean", "std_mean")
def _variance(call: Call) -> Any:
    dims = reductions.dims_of(call.self, call.dim)
    correction = call.correction if call.correction is not None else call.unbiased
    correction = 1.0 if correction is None else float(correction)
    found, middle = reductions.variance(
        call.context, call.name, call.self, dims, correction, bool(call.keepdim)
    )
    if call.operator.startswith("std"):
        found = call.context.state(f"{call.name}_root", reductions.mapped(found, "sqrt"))
    return (found, middle) if call.operator.endswith("_mean") else found


@handles("linalg_vector_norm", "norm")
def _norm(call: Call) -> Value:
    order = call.ord if call.ord is not None else call.p
    dims = reductions.dims_of(call.self, call.dim)
    if isinstance(order, str):
        raise NotExpressedError(f"a norm of kind {order}")
    order = 2.0 if order is None else float(order)
    return reductions.norm(call.context, call.name, call.self, order, dims, bool(call.keepdim))


@handles("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def _softmax(call: Call) -> Value:
    if call.operator == "_safe_softmax":
        return contractions.safe_softmax(call.context, call.name, call.self, call.dim)
    log = "log" in call.operator
    return reductions.softmax(call.context, call.name, call.self, call.dim, log)


@handles("logsumexp")
def _logsumexp(call: Call) -> Value:
    dims = reductions.dims_of(call.self, call.dim)
    return reductions.logsumexp(call.context, call.name, call.self, dims, bool(call.keepdim))


@handles("layer_norm", "native_layer_norm", "rms_norm")
def _layer_norm(call: Call) -> Any:
    epsilon = call.eps
    if epsilon is None:
        epsilon = torch.finfo(call.dtype).eps if call.operator == "rms_norm" else 1e-5
    found = reductions.layer_norm(
        call.context,
        call.name,
        call.input,
        len(call.normalized_shape),
        call.weight,
        call.bias,
        epsilon,
        call.operator != "rms_norm",
    )
    return found if call.operator == "native_layer_norm" else found[0]


@handles("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner")
def _matmul(call: Call) -> Value:
    a, b = list(call.arguments.values())[:2]
    return contractions.matmul(call.context, call.name, a, b)


@handles("addmm", "baddbmm", "addbmm")
def _addmm(call: Call) -> Value:
    a, b = list(call.arguments.values())[1:3]
    found = contractions.matmul(call.context, call.name, a, b)
    if call.alpha not in (None, 1):
        found = replace(found, expr=apply("mul", found.expr, float(call.alpha)))
    if call.beta == 0:
        return found
    start: Value = call.self
    if call.beta not in (None, 1):
        start = replace(start, expr=apply("mul", start.expr, float(call.beta)))
    return reductions.combine(call.context, "add", start, found)


@handles("linear")
def _linear(call: Call) -> Value:
    return contractions.linear(call.context, call.name, call.input, call.weight, call.bias)


@handles("einsum")
def _einsum(call: Call) -> Value:
    return contractions.einsum(call.context, call.name, call.equation, call.tensors)


#: What dispatch makes of scaled_dot_product_attention; only the first result is expressed.
_AFTER_DISPATCH = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_attention_math",
)


@handles("scaled_dot_product_attention", *_AFTER_DISPATCH)
def _attention(call: Call) -> Any:
    if call.dropout_p:
        raise NotExpressedError("attention with dropout")
    width = call.context.ranks
    head = math.prod(width.sizes[rank] for rank in call.query.dims[-1])
    scale = 1 / math.sqrt(head) if call.scale is None else float(call.scale)
    found = contractions.attention(
        call.context,
        call.name,
        call.query,
        call.key,
        call.value,
        call.attn_mask if call.attn_mask is not None else call.attn_bias,
        bool(call.is_causal),
        scale,
        bool(call.enable_gqa),
    )
    return (found, None) if call.operator in _AFTER_DISPATCH else found


@handles("gather")
def _gather(call: Call) -> Value:
    return contractions.gather(call.context, call.name, call.self, call.dim, call.index)


@handles("cross_entropy_loss")
def _cross_entropy(call: Call) -> Value:
    if call.weight is not None:
        raise NotExpressedError("cross-entropy with class weights")
    reduction = 1 if call.reduction is None else call.reduction
    ignore = -100 if call.ignore_index is None else call.ignore_index
    return losses.cross_entropy(
        call.context,
        call.name,
        call.self,
        call.target,
        reduction,
        ignore,
        call.label_smoothing or 0.0,
    )


@handles("nll_loss", "nll_loss_nd", "nll_loss_forward")
def _nll(call: Call) -> Any:
    if call.weight is not None:
        raise NotExpressedError("a loss with class weights")
    reduction = 1 if call.reduction is None else call.reduction
    ignore = -100 if call.ignore_index is None else call.ignore_index
    found = losses.negative_log_likelihood(
        call.context, call.name, call.self, call.target, reduction, ignore
    )
    return (found, None) if call.operator == "nll_loss_forward" else found


def constant(value: float | bool) -> Value:
    """A number as a value without dimensions."""
    kind = "bool" if isinstance(value, bool) else "integer" if isinstance(value, int) else "real"
    return Value((), Const(value if isinstance(value, bool) else float(value)), kind)
