"""Operators that act point by point, each as an expression of its arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...ir.cascade.expr import Const, Expr, add, apply, div, is_number, mul, sub
from .context import Context, Value
from .ranks import NotExpressedError

#: name of the ATen operator -> (number of tensor arguments, expression).
Rule = Callable[..., Expr]


def _expr(value: Expr | float) -> Expr:
    return Const(value) if isinstance(value, (int, float)) else value


def _add(a: Expr | float, b: Expr | float, alpha: float = 1) -> Expr:
    return add(_expr(a), _times(b, alpha))


def _sub(a: Expr | float, b: Expr | float, alpha: float = 1) -> Expr:
    return sub(_expr(a), _times(b, alpha))


def _times(value: Expr | float, alpha: float) -> Expr:
    found = _expr(value)
    return found if is_number(found, 0) else mul(found, Const(float(alpha)))


def _mul(a: Expr | float, b: Expr | float) -> Expr:
    return mul(_expr(a), _expr(b))


def _div(a: Expr, b: Expr, rounding_mode: str | None = None) -> Expr:
    if rounding_mode == "floor":
        return apply("floordiv", a, b)
    found = div(_expr(a), _expr(b))
    return found if rounding_mode is None else apply("trunc", found)


def _clamp(a: Expr, low: Any = None, high: Any = None) -> Expr:
    found = a
    if low is not None:
        found = apply("max", found, low)
    return found if high is None else apply("min", found, high)


def _gelu(x: Expr, approximate: str = "none") -> Expr:
    if approximate == "tanh":
        cube = apply("mul", 0.044715, apply("pow", x, 3.0))
        inner = apply("mul", math.sqrt(2 / math.pi), apply("add", x, cube))
        return apply("mul", apply("mul", 0.5, x), apply("add", 1.0, apply("tanh", inner)))
    inner = apply("erf", apply("mul", x, math.sqrt(0.5)))
    return apply("mul", apply("mul", 0.5, x), apply("add", 1.0, inner))


def _elu(x: Expr, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Expr:
    if (scale, input_scale) != (1, 1):
        raise NotExpressedError("elu with scales of its own")
    below = apply("mul", float(alpha), apply("sub", apply("exp", x), 1.0))
    return apply("where", apply("gt", x, 0.0), x, below)


def _softplus(x: Expr, beta: float = 1, threshold: float = 20) -> Expr:
    return apply("div", apply("softplus", apply("mul", x, float(beta))), float(beta))


def _exp2(x: Expr) -> Expr:
    return apply("exp", apply("mul", x, math.log(2)))


def _pow(base: Expr | float, exponent: Expr | float) -> Expr:
    """A number to a power is an exponential, so that a softmax to base two, or e, is one."""
    if isinstance(base, (int, float)) and not isinstance(exponent, (int, float)) and base > 0:
        return apply("exp", apply("mul", exponent, math.log(base)))
    return _expr(base) if is_number(_expr(exponent), 1) else apply("pow", base, exponent)


def _logaddexp(a: Expr, b: Expr) -> Expr:
    """log(exp(a) + exp(b)), from the larger of the two: -inf where both are."""
    top = apply("max", a, b)
    top = apply("where", apply("eq", apply("abs", top), math.inf), 0.0, top)
    total = apply("add", apply("exp", apply("sub", a, top)), apply("exp", apply("sub", b, top)))
    return apply("add", top, apply("log", total))


def _with_product(a: Expr, b: Expr, c: Expr, value: float = 1) -> Expr:
    return _add(a, _mul(b, c), value)


def _log_by(base: float) -> Rule:
    return lambda x: apply("div", apply("log", x), math.log(base))


def _unary(op: str) -> Rule:
    return lambda x: apply(op, x)


def _binary(op: str) -> Rule:
    return lambda a, b: apply(op, a, b)


def _replace_nan(x: Expr, nan: float | None = None, posinf: Any = None, neginf: Any = None) -> Expr:
    if posinf is not None or neginf is not None:
        raise NotExpressedError("nan_to_num with limits of its own")
    return apply("where", apply("eq", x, x), x, float(nan or 0))


#: The long names of comparisons.
_COMPARISONS = {"less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge"}
_COMPARISONS |= {"not_equal": "ne"}

RULES: dict[str, Rule] = {
    "add": _add,
    "sub": _sub,
    "rsub": lambda a, b, alpha=1: _sub(b, a, alpha),
    "mul": _mul,
    "div": _div,
    "true_divide": _div,
    "floor_divide": _binary("floordiv"),
    "remainder": _binary("mod"),
    "pow": _pow,
    "logaddexp": _logaddexp,
    "xlogy": lambda x, y: apply("mul", x, apply("log", y)),
    "special_xlogy": lambda x, y: apply("mul", x, apply("log", y)),
    "addcmul": _with_product,
    "addcdiv": lambda a, b, c, value=1: _with_product(a, b, apply("div", 1.0, c), value),
    "softsign": lambda x: apply("div", x, apply("add", apply("abs", x), 1.0)),
    "square": lambda x: apply("pow", x, 2.0),
    "maximum": _binary("max"),
    "minimum": _binary("min"),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda x, high: _clamp(x, None, high),
    "rsqrt": lambda x: apply("div", 1.0, apply("sqrt", x)),
    "reciprocal": lambda x: apply("div", 1.0, x),
    "expm1": lambda x: apply("sub", apply("exp", x), 1.0),
    "log1p": lambda x: apply("log", apply("add", x, 1.0)),
    "exp2": _exp2,
    "log2": _log_by(2),
    "log10": _log_by(10),
    "silu": lambda x: apply("mul", x, apply("sigmoid", x)),
    "gelu": _gelu,
    "elu": _elu,
    "softplus": _softplus,
    "hardtanh": lambda x, low=-1.0, high=1.0: _clamp(x, low, high),
    "nan_to_num": _replace_nan,
    "where": lambda c, a, b: apply("where", c, a, b),
    "masked_fill": lambda x, mask, value: apply("where", mask, value, x),
    "isnan": lambda x: apply("ne", x, x),
    "isinf": lambda x: apply("eq", apply("abs", x), math.inf),
    "logical_and": _binary("and"),
    "logical_or": _binary("or"),
    "logical_not": _unary("not"),
    "__rshift__": _binary("shift_right"),
    "bitwise_right_shift": _binary("shift_right"),
    "entr": lambda x: apply("neg", apply("mul", x, apply("log", x))),
    **{
        name: _unary(name)
        for name in ("neg", "exp", "log", "sqrt", "abs", "sign", "tanh", "sigmoid")
    },
    **{
        name: _unary(name)
        for name in ("relu", "erf", "sin", "cos", "floor", "ceil", "round", "trunc")
    },
    **{name: _binary(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{name: _binary(op) for name, op in _COMPARISONS.items()},
    "isfinite": _unary("isfinite"),
    "special_entr": lambda x: apply("neg", apply("mul", x, apply("log", x))),
    "bitwise_not": _unary("not"),
    "bitwise_and": _binary("bits"),
    "__and__": _binary("bits"),
    "bitwise_or": _binary("or"),
    "__or__": _binary("or"),
    "bitwise_xor": _binary("ne"),
    "__xor__": _binary("ne"),
    "logical_xor": _binary("ne"),
}

#: Of truth values these mean something else than of whole numbers.
_OF_TRUTH = {"bitwise_and": "and", "__and__": "and", "mul": "and"}
_OF_TRUTH |= {"bitwise_or": "or", "__or__": "or", "bitwise_not": "not"}
_OF_TRUTH |= {"bitwise_xor": "ne", "__xor__": "ne", "logical_xor": "ne"}
_TRUTH = {"logical_and", "logical_or", "logical_not", "isnan", "isinf", "isfinite"}
_TRUTH |= {"eq", "ne", "lt", "le", "gt", "ge", *_COMPARISONS}


def elementwise(
    context: Context, name: str, args: list[Any], kwargs: dict[str, Any], kind: str
) -> Value:
    """The value of a pointwise operator whose result is of `kind`. Raises NotExpressedError."""
    # A whole number to the power of whole numbers is one.
    rule = RULES[name] if (name, kind) != ("pow", "integer") else _binary("pow")
    at = [i for i, arg in enumerate(args) if isinstance(arg, Value)]
    values, dims = context.align([args[i] for i in at])
    only_truth = all(value.kind == "bool" for value in values)
    filled = list(args)
    for place, value in zip(at, values, strict=True):
        filled[place] = _operand(name, value, only_truth)
    real = frozenset().union(*(value.real for value in values))
    if only_truth and name in _OF_TRUTH:
        return Value(dims, apply(_OF_TRUTH[name], *filled), "bool", real)
    if name in ("bitwise_or", "__or__", "bitwise_not", "bitwise_xor", "__xor__", "logical_xor"):
        raise NotExpressedError(f"{name} of whole numbers")
    constants = [Const(a) if isinstance(a, (bool, int, float)) else a for a in filled]
    pick = constants if name in ("where", "masked_fill", "maximum", "minimum") else filled
    try:
        expr = rule(*_numbers(pick), **kwargs)
    except TypeError as error:
        raise NotExpressedError(f"aten.{name} with arguments of its own") from error
    return Value(dims, expr, kind, real)


def _numbers(args: list[Any]) -> list[Any]:
    return [float(a) if isinstance(a, int) and not isinstance(a, bool) else a for a in args]


def _operand(name: str, value: Value, only_truth: bool) -> Expr:
    """A truth value used as a number becomes 1 or 0."""
    stays = name in _TRUTH or name in ("where", "masked_fill") or (only_truth and name in _OF_TRUTH)
    if value.kind == "bool" and not stays:
        return apply("where", value.expr, 1.0, 0.0)
    return value.expr
