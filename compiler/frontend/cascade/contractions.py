"""Contractions: matrix products in all their spellings, and whole operators made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from string import ascii_letters

from ...ir.cascade.expr import ZERO, Pos, apply
from .context import Context, Value
from .ranks import NotExpressedError
from .reductions import combine, softmax
from .views import permute, repeat_interleave, squeeze, unsqueeze


def product(
    context: Context, name: str, a: Value, b: Value, labels_a: str, labels_b: str, out: str
) -> Value:
    """An einsum of two tensors, a letter a dimension. Letters that `out` lacks are summed."""
    a, b = _number(context.now(a)), _number(context.now(b))
    for at, letter in enumerate(labels_a):
        if letter in labels_b:
            a, b = context.meet(a, at, b, labels_b.index(letter))
    alone = [r for at, letter in enumerate(labels_b) if letter not in labels_a for r in b.dims[at]]
    clash = [rank for rank in alone if rank in a.ranks]
    if clash:
        b = context.distinct(b, clash)
    alone_a = [
        r for at, letter in enumerate(labels_a) if letter not in labels_b for r in a.dims[at]
    ]
    if any(rank in b.ranks for rank in alone_a):
        a = context.distinct(a, [rank for rank in alone_a if rank in b.ranks])
    dims = dict(zip(labels_b, b.dims, strict=True))
    for letter, dim in zip(labels_a, a.dims, strict=True):
        dims[letter] = dim or dims.get(letter, ())
    summed = [letter for letter in dims if letter not in out]
    order = [*out, *summed]
    # Masked values are selected after the product, so that what they hide may be anything.
    value = Value(
        tuple(dims[letter] for letter in order),
        apply("mul", a.expr, b.expr),
        "real",
        a.real | b.real,
    )
    if not summed:
        return value
    return context.reduce(name, "sum", value, range(len(out), len(order)))


def _number(value: Value) -> Value:
    if value.kind == "bool":
        return replace(value, expr=apply("where", value.expr, 1.0, 0.0), kind="real")
    return value


def matmul(context: Context, name: str, a: Value, b: Value) -> Value:
    """torch.matmul: vectors, matrices, batches that broadcast."""
    if len(a.dims) == 1:
        found = matmul(context, name, unsqueeze(a, 0), b if len(b.dims) > 1 else unsqueeze(b, 1))
        return squeeze(found, [-2] if len(b.dims) > 1 else [-2, -1])
    if len(b.dims) == 1:
        return squeeze(matmul(context, name, a, unsqueeze(b, 1)), [-1])
    batch = "abcdefgh"[: max(len(a.dims), len(b.dims)) - 2]
    left = batch[len(batch) - len(a.dims) + 2 :]
    right = batch[len(batch) - len(b.dims) + 2 :]
    return product(context, name, a, b, f"{left}mk", f"{right}kn", f"{batch}mn")


def linear(context: Context, name: str, x: Value, weight: Value, bias: Value | None) -> Value:
    """x W^T + b."""
    found = matmul(context, name, x, permute(weight, [1, 0]))
    return found if bias is None else combine(context, "add", found, bias)


def einsum(context: Context, name: str, equation: str, operands: Sequence[Value]) -> Value:
    """torch.einsum, two operands at a time, without repeated letters in an operand."""
    labels, out = _labels(equation, [len(operand.dims) for operand in operands])
    if any(len(set(part)) != len(part) for part in labels):
        raise NotExpressedError(f"einsum {equation!r}")
    value, have = operands[0], labels[0]
    for at, (operand, own) in enumerate(zip(operands[1:], labels[1:], strict=True), start=2):
        later = "".join(labels[at:]) + out
        keep = "".join(dict.fromkeys(c for c in have + own if c in later))
        last = at == len(labels)
        value = product(context, name, value, operand, have, own, out if last else keep)
        have = out if last else keep
    if len(operands) == 1:
        gone = [at for at, letter in enumerate(have) if letter not in out]
        value = context.reduce(name, "sum", value, gone) if gone else value
        have = "".join(letter for letter in have if letter in out)
        return permute(value, [have.index(letter) for letter in out])
    return value


def _labels(equation: str, widths: Sequence[int]) -> tuple[list[str], str]:
    """The letters of each operand and of the result: "..." written out, and "->" where it is left out."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    labels = left.split(",")
    free = [c for c in ascii_letters if c not in equation]
    spread = [
        width - len(part) + 3 for part, width in zip(labels, widths, strict=True) if "." in part
    ]
    every = "".join(free[: max(spread, default=0)])
    for at, part in enumerate(labels):
        own = widths[at] - len(part) + 3
        labels[at] = part.replace("...", every[len(every) - own :] if own > 0 else "")
    if not arrow:
        letters = sorted(set(left) - {",", "."})
        out = "..." * ("." in left) + "".join(c for c in letters if left.count(c) == 1)
    return labels, out.replace("...", every)


def attention(
    context: Context,
    name: str,
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None,
    causal: bool,
    scale: float,
    grouped: bool,
) -> Value:
    """scaled_dot_product_attention, spelled out: rows without a live key are zero."""
    if grouped:
        key, value = _spread_heads(context, query, key), _spread_heads(context, query, value)
    wide = len(key.dims)
    turned = permute(key, [*range(wide - 2), wide - 1, wide - 2])
    scores = combine(context, "mul", matmul(context, f"{name}_scores", query, turned), scale)
    if mask is not None and mask.kind == "bool":
        (test, scores), dims = context.align([mask, scores])
        hidden = apply("where", test.expr, scores.expr, -math.inf)
        scores = Value(dims, hidden, "real", scores.real)
    elif mask is not None:
        scores = combine(context, "add", scores, mask)
    if causal:
        scores = context.now(scores)
        row, column = scores.dims[-2], scores.dims[-1]
        if len(row) > 1 or len(column) > 1:
            raise NotExpressedError("a causal mask over a merged dimension")
        before = apply("le", *(Pos(dim[0]) if dim else ZERO for dim in (column, row)))
        scores = replace(scores, expr=apply("where", before, scores.expr, -math.inf))
    weights = (
        safe_softmax(context, name, scores, -1)
        if mask is not None
        else softmax(context, name, scores, -1)
    )
    return matmul(context, f"{name}_out", weights, value)


def safe_softmax(context: Context, name: str, scores: Value, dim: int) -> Value:
    """A softmax whose rows without a live key are zero instead of NaN."""
    scores = context.state(f"{name}_logits", scores)
    top = context.reduce(f"{name}_live", "max", scores, [dim], True)
    weights = softmax(context, f"{name}_weights", scores, dim)
    (row, all_weights), dims = context.align([top, weights])
    dead = apply("eq", row.expr, -math.inf)
    found = Value(dims, apply("where", dead, 0.0, all_weights.expr), "real", all_weights.real)
    return context.state(name, found)


def _spread_heads(context: Context, query: Value, key: Value) -> Value:
    heads, own = query.dims[-3], key.dims[-3]
    times = _length(context, heads) // _length(context, own)
    return repeat_interleave(context, key, times, -3)


def _length(context: Context, ranks: Sequence[str]) -> int:
    total = 1
    for rank in ranks:
        total *= context.ranks.sizes[rank]
    return total


def gather(context: Context, name: str, value: Value, dim: int, index: Value) -> Value:
    """value at index[..] along dim, as a sum of one: sum over t of where(pos(t) == index, value, 0)."""
    at = dim % len(value.dims)
    if index.dims[at]:
        raise NotExpressedError("a gather of several elements a row")
    value = context.state(f"{name}_of", value)
    if (
        len(value.dims[at]) != 1
        or value.dims[at][0] in value.real
        or context.ranks.virtual.get(value.dims[at][0])
    ):
        raise NotExpressedError("a gather along a merged or joined dimension")
    (value, index), dims = context.align([value, index])
    (rank,) = value.dims[at]
    picked = apply("where", apply("eq", Pos(rank), index.expr), value.expr, 0.0)
    return context.reduce(name, "sum", Value(dims, picked, value.kind, value.real), [at], True)
