"""Reductions within a tile: products as matrix instructions, the rest element by element.

A sum over one axis of a product is `tl.dot(left, right)` when its factors part into two sides, one for
each axis of the result. Factors that do not vary along the summed axis are taken out; those that vary
along nothing else go to the side that costs least.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...ir.cascade.expr import Apply, Expr, is_number
from .block import Block
from .moments import as_moment
from .roles import ROW, STREAM
from .values import PRODUCT, REAL, SUM, Value, number, operate, union

_IDENTITY = {"sum": "0.0", "max": 'float("-inf")', "min": 'float("inf")'}


@dataclass(frozen=True)
class Factor:
    """A factor of a product, or a divisor."""

    value: Value
    below: bool = False


def identity(op: str) -> Value:
    """What a reduction starts from."""
    return Value(_IDENTITY[op], (), "const")


def reduce(
    block: Block,
    op: str,
    expr: Expr,
    over: tuple[str, ...],
    *,
    env: Mapping[str, Value] | None = None,
    mask: str | None = None,
    onto: Value | None = None,
) -> Value:
    """The reduction of an expression over axes of the tile, joined to `onto`.

    `mask`, over the streamed axis, hides coordinates that do not exist.
    """
    if op == "sum" and len(over) == 1:
        found = _as_dot(block, expr, over[0], env or {}, mask, onto)
        if found is None and over == (STREAM,):
            found = as_moment(block, expr, env or {}, mask)
            found = found and joined(block, op, onto, found)
        if found is not None:
            return found
    value = block.value(expr, env)
    value = value if value.type == "const" else value.cast("fp32")
    if len(value.axes) > 2:
        block.kernel.held[" ".join(value.axes)] = (value.axes, 2)
    for axis in over:
        if axis == STREAM and (mask is not None or STREAM not in value.axes):
            live = Value(mask or "live_t", (STREAM,), "i1", True)
            value = operate("where", [live, value, identity(op)], block.kernel.order)
        value = _hide_lanes(block, op, value, axis)
        if axis not in value.axes:
            size = block.kernel.sizes[axis]
            value = (
                operate("mul", [value, number(size)], block.kernel.order) if op == "sum" else value
            )
            continue
        at = value.axes.index(axis)
        rest = tuple(a for a in value.axes if a != axis)
        value = Value(f"tl.{op}({value.text}, {at})", rest, "fp32", value.inner)
    return joined(block, op, onto, value)


def joined(block: Block, op: str, onto: Value | None, value: Value) -> Value:
    """Two parts of a reduction as one."""
    if onto is None:
        return value
    name = {"sum": "add", "max": "max", "min": "min"}[op]
    return operate(name, [onto, value], block.kernel.order)


def _hide_lanes(block: Block, op: str, value: Value, axis: str) -> Value:
    """Lanes that only pad must not count: they hold what the expression makes of zeros."""
    if axis in (ROW, STREAM) or axis not in value.axes:
        return value
    live = block.kernel.live(axis)
    if live is None:
        return value
    return operate("where", [Value(live, (axis,), "i1"), value, identity(op)], block.kernel.order)


def factors(
    block: Block, expr: Expr, env: Mapping[str, Value], below: bool = False
) -> list[Factor]:
    """The factors of a product; a selection of a product or 0 selects one of its factors."""
    if isinstance(expr, Apply):
        if expr.op == "mul":
            return [f for arg in expr.args for f in factors(block, arg, env, below)]
        if expr.op == "div":
            top, bottom = expr.args
            return factors(block, top, env, below) + factors(block, bottom, env, not below)
        if expr.op == "neg" and not below:
            return [Factor(number(-1.0)), *factors(block, expr.args[0], env)]
        if expr.op == "where" and is_number(expr.args[2], 0.0) and not below:
            return _selected(block, expr, env)
        if expr.op in ("f64", "f32", "f16", "bf16"):
            return factors(block, expr.args[0], env, below)
    return [Factor(block.value(expr, env), below)]


def _selected(block: Block, expr: Apply, env: Mapping[str, Value]) -> list[Factor]:
    test = block.value(expr.args[0], env)
    found = factors(block, expr.args[1], env)
    for at, factor in enumerate(found):
        if not factor.below and set(test.axes) <= set(factor.value.axes):
            chosen = operate("where", [test, factor.value, number(0.0)], block.kernel.order)
            return [*found[:at], Factor(chosen), *found[at + 1 :]]
    return [Factor(block.value(expr, env))]


def _as_dot(
    block: Block,
    expr: Expr,
    axis: str,
    env: Mapping[str, Value],
    mask: str | None,
    onto: Value | None,
) -> Value | None:
    order = block.kernel.order
    found = factors(block, expr, env)
    inside = [f for f in found if axis in f.value.axes]
    outside = [f for f in found if axis not in f.value.axes]
    result = tuple(a for a in union(order, [f.value for f in inside]) if a != axis)
    if len(result) != 2 or any(set(result) <= set(f.value.axes) for f in inside):
        return None
    first, second = result
    left = [f for f in inside if first in f.value.axes]
    right = [f for f in inside if second in f.value.axes]
    alone = [f for f in inside if f not in left and f not in right]
    if any(f.below for f in left) and all(f.below for f in left):
        return None
    (left if _carries_scales(block, axis, left, right) else right).extend(alone)
    hide = [mask if axis == STREAM else None, None]
    live = block.kernel.live(axis) if axis not in (ROW, STREAM) else None
    if live is not None and not any(_is_loaded(block, side) for side in (left, right)):
        # Lanes that only pad are 0 in what is loaded, and nothing of the kind in what is computed.
        hide[any(f.value.inner for f in left)] = live
    a = _operand(block, left, (first, axis), hide[0], axis)
    b = _operand(block, right, (axis, second), hide[1], axis)
    inner = max(f.value.inner for f in inside)
    still = inner > 0 and not any(f.value.inner for f in left)
    stored = len(right) == 1 and right[0].value.type == block.kernel.dot
    made = not (stored and _is_loaded(block, right))
    block.kernel.multiplies((first, axis), (axis, second), still, made)
    precision = (
        f', input_precision="{block.kernel.precision}"' if block.kernel.dot == "fp32" else ""
    )
    scalars = all(f.value.type == "const" and not f.below for f in outside)
    if onto is not None and not outside and onto.axes == result:
        return Value(f"tl.dot({a}, {b}, {onto.text}{precision})", result, "fp32", True)
    value = Value(f"tl.dot({a}, {b}{precision})", result, "fp32", inner)
    if outside and scalars:
        value = block.keep("product", value)
    for factor in outside:
        value = operate("div" if factor.below else "mul", [value, factor.value], order)
    return joined(block, "sum", onto, value)


def _carries_scales(block: Block, axis: str, left: list[Factor], right: list[Factor]) -> bool:
    """Whether factors along the summed axis alone go to the left.

    Ahead of the loop they cost nothing. In it, rows are few beside lanes, but weights times a scale may
    leave the range of float16.
    """
    still = not any(f.value.inner for f in left)
    if still or not any(f.value.inner for f in right):
        return still
    return block.kernel.dot != "fp16"


def _is_loaded(block: Block, parts: list[Factor]) -> bool:
    """Whether one of the factors is an input as it stands: 0 wherever there is none of it."""
    names = {block.kernel.variable(name) for name in block.kernel.tensors}
    return any(f.value.text in names and not f.below for f in parts)


def _operand(
    block: Block, parts: list[Factor], axes: tuple[str, str], mask: str | None, axis: str
) -> str:
    """One side of a matrix product, in the type of the product and with its axes in this order."""
    kernel = block.kernel
    value = _product(block, parts)
    missing = [axis for axis in axes if axis not in value.axes]
    assert not missing, "a side of a product lacks an axis"
    if mask is not None:
        live = Value(mask, (axis,), "i1", axis == STREAM)
        value = operate("where", [live, value, number(0.0)], kernel.order)
    if value.type != kernel.dot:
        value = value.cast(kernel.dot)
    if value.level < 9 or "(" in value.text:
        value = block.keep("side", value)
    turned = value.axes != axes
    return f"tl.trans({value.text})" if turned else value.text


def _product(block: Block, parts: list[Factor]) -> Value:
    if len(parts) == 1 and not parts[0].below and parts[0].value.type in REAL:
        return parts[0].value
    above = [f.value for f in parts if not f.below]
    value = above[0].real
    for other in above[1:]:
        value = operate("mul", [value, other], block.kernel.order)
    for factor in parts:
        if factor.below:
            value = operate("div", [value, factor.value], block.kernel.order)
    assert value.level >= SUM or value.level == PRODUCT
    return value
