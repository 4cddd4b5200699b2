"""ATen operators by name: how each is read and which move of the import it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...ir.cascade.expr import Const, apply
from . import contractions, losses, reductions, views
from .context import Context, Value
from .ranks import NotExpressedError
from .views import permute

#: (context, name of the result, arguments by the schema's names, sizes and extents of the result).
Handler = Callable[["Call"], Any]


class Call:
    """A call of an operator: `call.dim`, `call.self`, .. are its arguments by the schema's names."""

    def __init__(
        self,
        context: Context,
        name: str,
        arguments: dict[str, Any],
        sizes: Sequence[int],
        extents: Sequence[str],
        kind: str,
    ) -> None:
        self.context, self.name, self.arguments = context, name, arguments
        self.sizes, self.extents, self.kind = sizes, extents, kind

    def __getattr__(self, name: str) -> Any:
        return self.arguments.get(name)


HANDLERS: dict[str, Handler] = {}


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


@_handles("alias", "detach", "contiguous", "clone", "lift_fresh_copy", "lift", "_conj", "dropout")
def _same(call: Call) -> Value:
    if call.name.startswith("dropout") and call.train:
        raise NotExpressedError("dropout in training")
    found: Value = call.self if call.self is not None else call.input
    return found


@_handles("view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias", "view_as")
def _reshape(call: Call) -> Value:
    return views.reshape(call.context, call.self, call.sizes)


@_handles("permute")
def _permute(call: Call) -> Value:
    return permute(call.self, [dim % len(call.self.dims) for dim in call.dims])


@_handles("transpose", "swapaxes", "swapdims")
def _transpose(call: Call) -> Value:
    width = len(call.self.dims)
    a, b = (dim % width for dim in (list(call.arguments.values()))[1:3])
    order = list(range(width))
    order[a], order[b] = b, a
    return permute(call.self, order)


@_handles("t", "numpy_T")
def _t(call: Call) -> Value:
    return permute(call.self, list(range(len(call.self.dims)))[::-1])


@_handles("mT", "adjoint", "mH")
def _mt(call: Call) -> Value:
    width = len(call.self.dims)
    return permute(call.self, [*range(width - 2), width - 1, width - 2])


@_handles("movedim")
def _movedim(call: Call) -> Value:
    width = len(call.self.dims)
    source, target = ([d % width for d in _list(x)] for x in (call.source, call.destination))
    order: list[int] = [-1] * width
    for a, b in zip(source, target, strict=True):
        order[b] = a
    rest = iter(d for d in range(width) if d not in source)
    return permute(call.self, [next(rest) if d < 0 else d for d in order])


@_handles("unsqueeze")
def _unsqueeze(call: Call) -> Value:
    return views.unsqueeze(call.self, call.dim)


@_handles("squeeze")
def _squeeze(call: Call) -> Value:
    return views.squeeze(call.self, None if call.dim is None else _list(call.dim))


@_handles("expand", "expand_as", "broadcast_to")
def _expand(call: Call) -> Value:
    return views.expand(call.context, call.self, call.sizes, call.extents)


@_handles("repeat")
def _repeat(call: Call) -> Value:
    return views.repeat(call.context, call.self, call.repeats)


@_handles("repeat_interleave")
def _repeat_interleave(call: Call) -> Value:
    if not isinstance(call.repeats, int) or call.dim is None:
        raise NotExpressedError("repeat_interleave by a tensor")
    return views.repeat_interleave(call.context, call.self, call.repeats, call.dim)


@_handles("cat", "concat", "concatenate")
def _cat(call: Call) -> Value:
    return views.concatenate(call.context, call.tensors, call.dim or 0)


@_handles("slice", "narrow")
def _slice(call: Call) -> Value:
    start = call.start or 0
    end = start + call.length if call.length is not None else call.end
    end = 2**62 if end is None else end
    return views.cut(call.context, call.self, call.dim or 0, start, end, call.step or 1)


@_handles("select")
def _select(call: Call) -> Value:
    if call.self.dims[call.dim]:
        raise NotExpressedError("one coordinate of a rank")
    return views.squeeze(call.self, [call.dim])


@_handles("arange")
def _arange(call: Call) -> Value:
    return views.arange(
        call.context, call.start or 0, call.step or 1, call.sizes[0], call.extents[0]
    )


@_handles(
    "full",
    "full_like",
    "zeros",
    "ones",
    "zeros_like",
    "ones_like",
    "new_full",
    "new_zeros",
    "new_ones",
)
@_handles("scalar_tensor")
def _filled(call: Call) -> Value:
    fill = call.fill_value if call.fill_value is not None else call.s
    if fill is None:
        fill = 1.0 if "ones" in call.operator else 0.0
    return views.filled(call.context, call.sizes, call.extents, fill, call.kind)


@_handles("tril", "triu")
def _triangle(call: Call) -> Value:
    return views.triangle(call.context, call.self, call.diagonal or 0, call.operator == "tril")


@_handles("_to_copy", "to", "type_as", "float", "half", "bfloat16", "double")
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


@_handles("sum", "any")
def _sum(call: Call) -> Value:
    op = "max" if call.operator == "any" else "sum"
    dims = reductions.dims_of(call.self, call.dim)
    return call.context.reduce(call.name, op, call.self, dims, bool(call.keepdim))


@_handles("amax", "amin", "max", "min")
def _extreme(call: Call) -> Any:
    if call.other is not None:
        raise NotExpressedError("a maximum of two tensors")
    dims = reductions.dims_of(call.self, call.dim)
    op = call.operator.removeprefix("a")
    found = call.context.reduce(call.name, op, call.self, dims, bool(call.keepdim))
    return (found, None) if call.operator in ("max", "min") and call.dim is not None else found


@_handles("mean")
def _mean(call: Call) -> Value:
    dims = reductions.dims_of(call.self, call.dim)
    return reductions.mean(call.context, call.name, call.self, dims, bool(call.keepdim))


@_handles("var", "std", "var_mean", "std_mean")
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


@_handles("linalg_vector_norm", "norm")
def _norm(call: Call) -> Value:
    order = call.ord if call.ord is not None else call.p
    dims = reductions.dims_of(call.self, call.dim)
    order = 2.0 if order is None else float(order)
    return reductions.norm(call.context, call.name, call.self, order, dims, bool(call.keepdim))


@_handles("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def _softmax(call: Call) -> Value:
    if call.operator == "_safe_softmax":
        return contractions.safe_softmax(call.context, call.name, call.self, call.dim)
    log = "log" in call.operator
    return reductions.softmax(call.context, call.name, call.self, call.dim, log)


@_handles("logsumexp")
def _logsumexp(call: Call) -> Value:
    dims = reductions.dims_of(call.self, call.dim)
    return reductions.logsumexp(call.context, call.name, call.self, dims, bool(call.keepdim))


@_handles("layer_norm", "native_layer_norm", "rms_norm")
def _layer_norm(call: Call) -> Any:
    epsilon = 1e-5 if call.eps is None else call.eps
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


@_handles("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner")
def _matmul(call: Call) -> Value:
    a, b = list(call.arguments.values())[:2]
    return contractions.matmul(call.context, call.name, a, b)


@_handles("addmm", "baddbmm", "addbmm")
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


@_handles("linear")
def _linear(call: Call) -> Value:
    return contractions.linear(call.context, call.name, call.input, call.weight, call.bias)


@_handles("einsum")
def _einsum(call: Call) -> Value:
    return contractions.einsum(call.context, call.name, call.equation, call.tensors)


@_handles("scaled_dot_product_attention")
def _attention(call: Call) -> Value:
    if call.dropout_p:
        raise NotExpressedError("attention with dropout")
    width = call.context.ranks
    head = math.prod(width.sizes[rank] for rank in call.query.dims[-1])
    scale = 1 / math.sqrt(head) if call.scale is None else float(call.scale)
    return contractions.attention(
        call.context,
        call.name,
        call.query,
        call.key,
        call.value,
        call.attn_mask,
        bool(call.is_causal),
        scale,
        bool(call.enable_gqa),
    )


@_handles("gather")
def _gather(call: Call) -> Value:
    return contractions.gather(call.context, call.name, call.self, call.dim, call.index)


@_handles("cross_entropy_loss")
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


@_handles("nll_loss", "nll_loss_nd", "nll_loss_forward")
def _nll(call: Call) -> Any:
    if call.weight is not None:
        raise NotExpressedError("a loss with class weights")
    reduction = 1 if call.reduction is None else call.reduction
    ignore = -100 if call.ignore_index is None else call.ignore_index
    found = losses.negative_log_likelihood(
        call.context, call.name, call.self, call.target, reduction, ignore
    )
    return (found, None) if call.operator == "nll_loss_forward" else found


def _list(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def constant(value: float | bool) -> Value:
    """A number as a value without dimensions."""
    kind = "bool" if isinstance(value, bool) else "integer" if isinstance(value, int) else "real"
    return Value((), Const(value if isinstance(value, bool) else float(value)), kind)
