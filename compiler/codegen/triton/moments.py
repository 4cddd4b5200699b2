"""Moments about a centre that differs from row to row, as matrix products.

    sum over t of E[s, t] * (v[t, f] - mid[s, f]) ** 2

has a term for every s, t and f. About a centre c[f] of the tile's own values it is three sums of two
axes each, with w = v - c and m = mid - c:

    E w**2  -  2 m (E w)  +  m**2 (E 1)

Expanded about 0 instead, values far from 0 beside their spread would cancel; about c they do not. The
products are in float32 (as tf32 for narrower inputs): squares may leave the range of float16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...ir.cascade.expr import Apply, Expr
from .block import Block
from .pressure import Product
from .roles import ROW, STREAM
from .values import Value, number, operate, union


@dataclass(frozen=True)
class Moment:
    """A product of `weights` and the `power`-th power of `value` - `centre`."""

    weights: tuple[Expr, ...]
    value: Expr
    centre: Expr
    power: int


def moment(expr: Expr) -> list[Moment]:
    """The ways to read a product as a moment of the first or second order."""
    parts = _parts(expr)
    found = []
    for part in dict.fromkeys(parts):
        if isinstance(part, Apply) and part.op == "sub" and parts.count(part) in (1, 2):
            rest = tuple(p for p in parts if p != part)
            if rest:
                found.append(Moment(rest, part.args[0], part.args[1], parts.count(part)))
    return found


def _parts(expr: Expr) -> list[Expr]:
    if isinstance(expr, Apply) and expr.op == "mul":
        return [part for arg in expr.args for part in _parts(arg)]
    return [expr]


def as_moment(block: Block, expr: Expr, env: Mapping[str, Value], mask: str | None) -> Value | None:
    """The sum over the streamed axis of a moment; None where the expression is none."""
    order = block.kernel.order
    for found in moment(expr):
        weights = [block.value(part, env).real for part in found.weights]
        value, centre = block.value(found.value, env).real, block.value(found.centre, env)
        lanes = tuple(axis for axis in value.axes if axis != STREAM)
        fits = union(order, weights) == (ROW, STREAM) and centre.axes == (ROW, *lanes)
        if fits and len(lanes) == 1 and STREAM in value.axes:
            return _emit(block, weights, value, centre, found.power, mask)
    return None


def _emit(
    block: Block,
    weights: Sequence[Value],
    value: Value,
    centre: Value,
    power: int,
    mask: str | None,
) -> Value:
    kernel = block.kernel
    order = kernel.order
    live = Value("live_t", (STREAM,), "i1", True)
    weight = weights[0]
    for other in weights[1:]:
        weight = operate("mul", [weight, other], order)
    if mask is not None:
        weight = operate("where", [live, weight, number(0.0)], order)
    weight = _named(block, "weight", weight)
    lane = next(axis for axis in value.axes if axis != STREAM)
    inside = operate("where", [live, value, number(0.0)], order)
    total = f"tl.sum({inside.text}, {inside.axes.index(STREAM)})"
    near = f"{total} / tl.maximum(tl.sum(live_t.to(tl.float32), 0), 1.0)"
    # The values about their middle; the two products and the centre, which no state takes in.
    kernel.held |= {"about the middle": (value.axes, 2), "moments": ((ROW, lane), 3)}
    middle = block.keep("middle", Value(near, (lane,), "fp32", True))
    away = _named(block, "away", operate("sub", [value, middle], order))
    moved = _named(block, "moved", operate("sub", [centre, middle], order))
    count = block.keep(
        "mass", Value(f"tl.sum({weight.text}, {weight.axes.index(STREAM)})", (ROW,), "fp32", True)
    )
    precision = kernel.precision if kernel.dot == "fp32" else "tf32"
    if kernel.dot == "fp32":
        kernel.multiplies((ROW, STREAM), (STREAM, lane), False, True)
    else:
        kernel.products.add(Product((ROW, STREAM), (STREAM, lane), 4, False))

    def dot(right: Value) -> Value:
        text = f'tl.dot({weight.text}, {right.text}, input_precision="{precision}")'
        return block.keep("product", Value(text, (ROW, lane), "fp32", True))

    first = dot(away)
    if power == 1:
        return operate("sub", [first, operate("mul", [moved, count], order)], order)
    second = dot(_named(block, "square", operate("mul", [away, away], order)))
    twice = operate("mul", [number(2.0), first], order)
    inner = operate("sub", [operate("mul", [moved, count], order), twice], order)
    return operate("add", [second, operate("mul", [moved, inner], order)], order)


def _named(block: Block, wanted: str, value: Value) -> Value:
    return block.keep(wanted, replace(value.cast("fp32"), inner=True))
