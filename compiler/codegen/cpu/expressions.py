"""Expressions of plans as torch operators, over ranks in a given order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...ir.cascade.expr import Apply, Const, Expr, Pos, Ref, Size, Virtual, ranks_of, rewrite
from .frame import Frame, NotLoweredError, Value

Number = Any

_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "pow": lambda a, b: a**b,
    "neg": lambda a: -a,
    "or": lambda a, b: _truth(a, b, torch.logical_or, lambda x, y: x or y),
    "and": lambda a, b: _truth(a, b, torch.logical_and, lambda x, y: x and y),
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "not": lambda a: torch.logical_not(a) if isinstance(a, torch.Tensor) else not a,
    "shift_right": lambda a, b: a.to(torch.int64) >> int(b),
    "bits": lambda a, b: a.to(torch.int64) & int(b),
}
#: Narrowing is transparent to the algebra; everything point by point is computed in float32.
_CASTS = {"f64", "f32", "f16", "bf16"}


def _truth(a: Any, b: Any, tensors: Callable[..., Any], plain: Callable[..., Any]) -> Any:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return tensors(a, b)
    if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
        return plain(a, b)
    tensor, known = (a, b) if isinstance(a, torch.Tensor) else (b, a)
    neutral = plain(True, False) is False
    if bool(known) is neutral:
        return tensor
    return torch.full_like(tensor, not neutral)


def wide(frame: Frame, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the frame's type. Booleans stay, and whole numbers that the type may not hold."""
    if tensor.dtype in (torch.bool, frame.dtype):
        return tensor
    if tensor.dtype in (torch.int64, torch.float64) and frame.dtype != torch.float64:
        return tensor
    return tensor.to(frame.dtype)


def evaluate(frame: Frame, expr: Expr, order: Sequence[str]) -> Any:
    """The expression as a tensor that broadcasts over `order`, or as a number where it has no tensor."""
    if isinstance(expr, Const):
        return expr.value
    if isinstance(expr, Ref) and expr.tensor in frame.numbers:
        return frame.numbers[expr.tensor]
    if isinstance(expr, Ref):
        return wide(frame, frame.values[expr.tensor].over(order))
    if isinstance(expr, Size):
        return frame.size(expr.rank)
    if isinstance(expr, Pos):
        return _places(frame, expr.rank).over(order)
    if isinstance(expr, Virtual):
        if expr.rank not in frame.virtual:
            return False
        at = _places(frame, expr.rank).over(order)
        return at == frame.size(expr.rank) + expr.number
    args = [evaluate(frame, arg, order) for arg in expr.args]
    return _apply(frame, expr.op, args)


def _places(frame: Frame, rank: str) -> Value:
    at = torch.arange(frame.length(rank), device=frame.device)
    return Value(wide(frame, at), (rank,))


def _apply(frame: Frame, op: str, args: list[Any]) -> Any:
    if op in _CASTS:
        return args[0]
    if op in ("max", "min"):
        return _extreme(op, *args)
    if op == "where":
        return _where(frame, *args)
    if op in frame.functions:
        value = as_tensor(frame, args[0])
        return frame.functions[op](_real(frame, value) if op not in ("abs", "sign") else value)
    if op not in _OPERATORS:
        raise NotLoweredError(f"no torch operator for {op}")
    return _OPERATORS[op](*[_plain(arg) for arg in args])


def _plain(arg: Any) -> Any:
    """Whole numbers stay whole beside tensors of whole numbers."""
    if isinstance(arg, float) and arg.is_integer() and abs(arg) < 2**31:
        return int(arg)
    return arg


def _real(frame: Frame, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype.is_floating_point else tensor.to(frame.dtype)


def _extreme(op: str, a: Any, b: Any) -> Any:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.maximum(a, b) if op == "max" else torch.minimum(a, b)
    if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
        return max(a, b) if op == "max" else min(a, b)
    tensor, number = (a, b) if isinstance(a, torch.Tensor) else (b, a)
    return tensor.clamp_min(number) if op == "max" else tensor.clamp_max(number)


def _where(frame: Frame, test: Any, yes: Any, no: Any) -> Any:
    if not isinstance(test, torch.Tensor):
        return yes if test else no
    if isinstance(yes, torch.Tensor) and yes.dtype != torch.bool:
        yes = _real(frame, yes)
    if isinstance(no, torch.Tensor) and no.dtype != torch.bool:
        no = _real(frame, no)
    if not isinstance(yes, torch.Tensor) and not isinstance(no, torch.Tensor):
        yes = as_tensor(frame, yes)
    return torch.where(test, yes, no)


def on_real(expr: Expr) -> Expr:
    """The expression at real coordinates, where no virtual one is met, with what follows from that."""
    return simplified(
        rewrite(expr, lambda part: Const(False) if isinstance(part, Virtual) else None)
    )


def on_virtual(expr: Expr, rank: str, number: int, streamed: Mapping[str, bool]) -> Expr:
    """The expression at one virtual coordinate of `rank`: what is streamed reads 0 there."""

    def change(part: Expr) -> Expr | None:
        if isinstance(part, Virtual):
            return Const(part.rank == rank and part.number == number)
        if isinstance(part, Ref) and streamed.get(part.tensor, False):
            return Const(0.0)
        if isinstance(part, Pos) and part.rank == rank:
            return Apply("add", (Size(rank), Const(float(number))))
        return None

    return simplified(rewrite(expr, change))


def simplified(expr: Expr) -> Expr:
    """The expression without choices that are made, and without products with a plain zero."""
    if not isinstance(expr, Apply):
        return expr
    args = tuple(simplified(arg) for arg in expr.args)
    op = expr.op
    if op == "where" and isinstance(args[0], Const):
        return args[1] if args[0].value else args[2]
    if op == "not" and isinstance(args[0], Const):
        return Const(not args[0].value)
    if op in ("and", "or") and any(isinstance(arg, Const) for arg in args):
        known, other = args if isinstance(args[0], Const) else args[::-1]
        assert isinstance(known, Const)
        return other if bool(known.value) is (op == "and") else Const(op == "or")
    if op == "mul" and any(_is(arg, 0.0) for arg in args):
        return Const(0.0)
    if op == "mul" and any(_is(arg, 1.0) for arg in args):
        return args[1] if _is(args[0], 1.0) else args[0]
    if op == "div" and _is(args[1], 1.0):
        return args[0]
    if op in ("add", "sub") and _is(args[1], 0.0):
        return args[0]
    if op == "add" and _is(args[0], 0.0):
        return args[1]
    if op in _CASTS:
        return args[0]
    return Apply(op, args)


def _is(expr: Expr, value: float) -> bool:
    return isinstance(expr, Const) and not isinstance(expr.value, bool) and expr.value == value


def factors(expr: Expr) -> list[Expr]:
    """The factors of a product; a choice between a product and 0 has the test as one of them."""
    if isinstance(expr, Apply) and expr.op == "mul":
        return factors(expr.args[0]) + factors(expr.args[1])
    if isinstance(expr, Apply) and expr.op == "where":
        test, yes, no = expr.args
        if _is(no, 0.0):
            return [Apply("where", (test, Const(1.0), Const(0.0))), *factors(yes)]
    return [expr]


def product(parts: Sequence[Expr]) -> Expr:
    """The product of factors; the number one without any."""
    found: Expr = Const(1.0)
    for part in parts:
        found = part if _is(found, 1.0) else Apply("mul", (found, part))
    return found


def order_of(expr: Expr, ranks: Sequence[str]) -> tuple[str, ...]:
    """The ranks of an expression in the order in which `ranks` has them."""
    inside = ranks_of(expr)
    return tuple(rank for rank in ranks if rank in inside)


def as_tensor(frame: Frame, value: Any) -> torch.Tensor:
    """A number as a tensor."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.scalar_tensor(value, dtype=frame.dtype, device=frame.device)
