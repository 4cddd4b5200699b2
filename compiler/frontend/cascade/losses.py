"""Cross-entropy as a cascade over the classes: a log-softmax, a pick by index, a mean for smoothing."""

from __future__ import annotations

from dataclasses import replace

from ...ir.cascade.expr import apply
from .context import Context, Value
from .contractions import gather
from .ranks import NotExpressedError
from .reductions import combine, mean, softmax
from .views import squeeze, unsqueeze

_NONE, _MEAN, _SUM = 0, 1, 2


def cross_entropy(
    context: Context,
    name: str,
    logits: Value,
    target: Value,
    reduction: int,
    ignore_index: int,
    smoothing: float,
) -> Value:
    """-(1 - a) log p[target] - a mean(log p), over rows whose target is not ignored. Classes are dim 1."""
    log_p = softmax(context, f"{name}_log", logits, 1 if len(logits.dims) > 1 else 0, log=True)
    return negative_log_likelihood(context, name, log_p, target, reduction, ignore_index, smoothing)


def negative_log_likelihood(
    context: Context,
    name: str,
    log_p: Value,
    target: Value,
    reduction: int,
    ignore_index: int,
    smoothing: float = 0.0,
) -> Value:
    """The loss of log-probabilities [N, C] or [C] for class indices [N] or []."""
    if target.kind != "integer":
        raise NotExpressedError("cross-entropy against probabilities")
    at = 1 if len(log_p.dims) > 1 else 0
    picked = gather(context, f"{name}_picked", log_p, at, unsqueeze(target, at))
    loss = replace(picked, expr=apply("mul", picked.expr, smoothing - 1.0))
    if smoothing:
        middle = mean(context, f"{name}_mean", log_p, [at], True)
        (loss, middle), dims = context.align([loss, middle])
        smooth = apply("mul", middle.expr, float(smoothing))
        loss = Value(dims, apply("sub", loss.expr, smooth), "real")
    loss = squeeze(loss, [at])
    (loss, target), dims = context.align([loss, target])
    counts = Value(dims, apply("ne", target.expr, float(ignore_index)), "bool")
    loss = Value(dims, apply("where", counts.expr, loss.expr, 0.0), "real")
    if reduction == _NONE:
        return context.state(name, loss)
    every = list(range(len(dims)))
    total = context.reduce(f"{name}_total", "sum", loss, every)
    if reduction == _SUM:
        return total
    rows = context.reduce(f"{name}_rows", "sum", counts, every)
    return context.state(name, combine(context, "div", total, rows))
