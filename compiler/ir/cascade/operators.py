"""The operators of expressions and what each means, in NumPy.

A table and no more: how an operator is written, how many arguments it takes, its meaning, and where
it rises or falls (which is what lets a max be taken through it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Operator:
    """One operator.

    `symbol` and `precedence` for those written between their arguments; `slope` is +1 or -1 for a
    function that rises or falls everywhere, 0 otherwise; `truth` says that the result is true or false;
    `cast` marks changes of type, of which the `exact` ones keep the value but for float rounding.
    """

    name: str
    arity: int
    meaning: Callable[..., Any]
    symbol: str = ""
    precedence: int = 0
    slope: int = 0
    truth: bool = False
    cast: bool = False
    exact: bool = False


def _erf(x: Any) -> Any:
    from math import erf

    return np.vectorize(erf, otypes=[float])(x)


def _sigmoid(x: Any) -> Any:
    return np.exp(-np.logaddexp(0, -np.asarray(x, float)))


def _shift(x: Any, by: Any) -> Any:
    return np.right_shift(np.asarray(x).astype(np.int64), np.asarray(by).astype(np.int64))


def _bits(x: Any, mask: Any) -> Any:
    return np.bitwise_and(np.asarray(x).astype(np.int64), np.asarray(mask).astype(np.int64))


def _fmod(a: Any, b: Any) -> Any:
    return np.mod(a, b)


_INFIX = [
    Operator("or", 2, np.logical_or, "|", 1, truth=True),
    Operator("and", 2, np.logical_and, "&", 2, truth=True),
    Operator("eq", 2, np.equal, "==", 3, truth=True),
    Operator("ne", 2, np.not_equal, "!=", 3, truth=True),
    Operator("lt", 2, np.less, "<", 3, truth=True),
    Operator("le", 2, np.less_equal, "<=", 3, truth=True),
    Operator("gt", 2, np.greater, ">", 3, truth=True),
    Operator("ge", 2, np.greater_equal, ">=", 3, truth=True),
    Operator("add", 2, np.add, "+", 4),
    Operator("sub", 2, np.subtract, "-", 4),
    Operator("mul", 2, np.multiply, "*", 5),
    Operator("div", 2, np.divide, "/", 5),
    Operator("floordiv", 2, np.floor_divide, "//", 5),
    Operator("mod", 2, _fmod, "%", 5),
    Operator("pow", 2, np.power, "**", 7),
]

_FUNCTIONS = [
    Operator("neg", 1, np.negative, slope=-1),
    Operator("not", 1, np.logical_not, truth=True),
    Operator("where", 3, np.where),
    Operator("max", 2, np.maximum),
    Operator("min", 2, np.minimum),
    Operator("exp", 1, np.exp, slope=1),
    Operator("log", 1, np.log, slope=1),
    Operator("sqrt", 1, np.sqrt, slope=1),
    Operator("abs", 1, np.abs),
    Operator("sign", 1, np.sign),
    Operator("tanh", 1, np.tanh, slope=1),
    Operator("sigmoid", 1, _sigmoid, slope=1),
    Operator("relu", 1, lambda x: np.maximum(x, 0), slope=1),
    Operator("softplus", 1, lambda x: np.logaddexp(0, x), slope=1),
    Operator("erf", 1, _erf, slope=1),
    Operator("sin", 1, np.sin),
    Operator("cos", 1, np.cos),
    Operator("floor", 1, np.floor),
    Operator("ceil", 1, np.ceil),
    Operator("round", 1, np.round),
    Operator("trunc", 1, np.trunc),
    Operator("shift_right", 2, _shift),
    Operator("bits", 2, _bits),
    Operator("isfinite", 1, np.isfinite, truth=True),
]

#: Float casts are transparent to the algebra: the reference is computed in float64 throughout.
_CASTS = [
    Operator(name, 1, lambda x: np.asarray(x, float), cast=True, exact=True)
    for name in ("f64", "f32", "f16", "bf16")
]

OPERATORS: dict[str, Operator] = {op.name: op for op in [*_INFIX, *_FUNCTIONS, *_CASTS]}
SYMBOLS: dict[str, Operator] = {op.symbol: op for op in _INFIX}

#: What a reduction starts from, and how it joins two values.
REDUCTIONS: dict[str, tuple[float, Callable[..., Any]]] = {
    "sum": (0.0, np.add),
    "max": (float("-inf"), np.maximum),
    "min": (float("inf"), np.minimum),
}
