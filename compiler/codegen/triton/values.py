"""Values in generated source: a text, the axes of its tile, its type; and how operators are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ....errors import UnsupportedError

#: Storage types by the names that Triton gives them. Arithmetic is in float32 and in integers.
REAL = {"fp32": "tl.float32", "fp16": "tl.float16", "bf16": "tl.bfloat16"}
WHOLE = ("i8", "u8", "i16", "i32", "i64")
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "i8": 1, "u8": 1, "i1": 1, "i16": 2, "i32": 4, "i64": 8}

ATOM, UNARY, PRODUCT, SUM, AND, OR, TEST = 9, 7, 6, 5, 3, 2, 1


@dataclass(frozen=True)
class Value:
    """A piece of source.

    `type` is a storage type, or "const" for a number that takes the other's type; `level` is its
    operator's precedence. `inner` is the number of loops that it changes in: 0 none, 1 from tile to tile of
    the streamed rank, 2 along a walked rank within a tile.
    """

    text: str
    axes: tuple[str, ...] = ()
    type: str = "fp32"
    inner: int = 0
    level: int = ATOM

    def at(self, level: int) -> str:
        """The text, in brackets where an operator of this precedence needs them."""
        return self.text if self.level >= level else f"({self.text})"

    def over(self, axes: Sequence[str], level: int = ATOM) -> str:
        """The text spread over more axes."""
        if not self.axes or tuple(axes) == self.axes:
            return self.at(level)
        places = ", ".join(":" if axis in self.axes else "None" for axis in axes)
        return f"{self.at(ATOM)}[{places}]"

    @property
    def real(self) -> Value:
        """The value for arithmetic: float32, or an integer of more than a byte."""
        if self.type in ("fp32", "const") or (self.type in WHOLE and BYTES[self.type] > 1):
            return self
        return self.cast("fp32")

    def cast(self, kind: str) -> Value:
        """The value in a storage type."""
        if self.type == kind:
            return self
        if self.type == "const" and not self.axes:
            return replace(self, type=kind)
        return replace(self, text=f"{self.at(ATOM)}.to({REAL[kind]})", type=kind, level=ATOM)


def number(value: float | bool) -> Value:
    """A constant."""
    if isinstance(value, bool):
        return Value("True" if value else "False", (), "i1")
    value = float(value)
    if math.isnan(value) or math.isinf(value):
        return Value(f'float("{value}")', (), "const")
    level = UNARY if value < 0 else ATOM
    if value.is_integer() and abs(value) < 2**31:
        return Value(f"{value:.1f}", (), "const", False, level)
    return Value(repr(value), (), "const", False, level)


def union(axes: Sequence[str], values: Sequence[Value]) -> tuple[str, ...]:
    """The axes that any of the values has, in the order of `axes`."""
    return tuple(axis for axis in axes if any(axis in value.axes for value in values))


def whole(value: Value) -> Value:
    """A constant as an integer, where it is one."""
    if value.type == "const" and value.text.endswith(".0"):
        return replace(value, text=value.text[:-2])
    return value


def joined(values: Sequence[Value]) -> tuple[str, list[Value]]:
    """The type that an operator computes in, and its arguments in it."""
    values = [value.real for value in values]
    kinds = {value.type for value in values}
    if kinds <= {*WHOLE, "const"} and kinds != {"const"}:
        integral = [whole(value) for value in values]
        if all(v.type != "const" or "." not in v.text for v in integral) and not any(
            "float" in v.text for v in integral if v.type == "const"
        ):
            wide = max((k for k in kinds if k != "const"), key=lambda k: BYTES[k])
            return wide, integral
    return "fp32", [v.cast("fp32") if v.type in WHOLE else v for v in values]


_INFIX = {
    "add": ("+", SUM),
    "sub": ("-", SUM),
    "mul": ("*", PRODUCT),
    "div": ("/", PRODUCT),
    "lt": ("<", TEST),
    "le": ("<=", TEST),
    "gt": (">", TEST),
    "ge": (">=", TEST),
    "eq": ("==", TEST),
    "ne": ("!=", TEST),
    "and": ("&", AND),
    "or": ("|", OR),
}
_TESTS = ("lt", "le", "gt", "ge", "eq", "ne")
OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
_CALLS = {
    "exp": "tl.exp({})",
    "log": "tl.log({})",
    "sqrt": "tl.sqrt({})",
    "abs": "tl.abs({})",
    "sigmoid": "tl.sigmoid({})",
    "erf": "tl.erf({})",
    "sin": "tl.sin({})",
    "cos": "tl.cos({})",
    "floor": "tl.floor({})",
    "ceil": "tl.ceil({})",
    "relu": "tl.maximum({}, 0.0)",
    # 1 - 2 / (exp(2x) + 1) neither overflows to NaN nor needs a library call.
    "tanh": "(1.0 - 2.0 / (tl.exp(2.0 * {}) + 1.0))",
    "softplus": "(tl.maximum({0}, 0.0) + tl.log(1.0 + tl.exp(-tl.abs({0}))))",
    "sign": "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))",
    "trunc": "tl.where({0} < 0, tl.ceil({0}), tl.floor({0}))",
    # Adding 1.5 * 2**23 leaves no bits for a fraction: half goes to even, as in IEEE.
    "round": "tl.where(tl.abs({0}) < 4194304.0, ({0} + 12582912.0) - 12582912.0, {0})",
}


def operate(op: str, args: Sequence[Value], order: Sequence[str]) -> Value:
    """An operator on values, its arguments spread over their common axes.

    Raises UnsupportedError for an operator that has no form in Triton.
    """
    axes = union(order, args)
    inner = max(arg.inner for arg in args)
    if op in _INFIX:
        return _infix(op, args, axes, inner)
    if op == "where":
        return _where(args, axes, inner)
    if op in ("max", "min"):
        kind, (a, b) = joined(args)
        return Value(f"tl.{op}imum({a.over(axes, 0)}, {b.over(axes, 0)})", axes, kind, inner)
    if op == "not":
        return Value(f"{args[0].at(SUM)} == 0", axes, "i1", inner, TEST)
    if op in ("f64", "f32", "f16", "bf16"):
        return args[0].real
    if op == "pow":
        return _power(args[0], args[1], axes, inner)
    if op in ("floordiv", "mod", "shift_right", "bits"):
        return _integral(op, args, axes, inner)
    value = args[0].real
    if op == "neg":
        return Value(f"-{value.at(UNARY)}", axes, _plain(value), inner, UNARY)
    value = value.cast("fp32")
    if op == "isfinite":
        return Value(f'tl.abs({value.text}) < float("inf")', axes, "i1", inner, TEST)
    if op not in _CALLS:
        raise UnsupportedError(f"the operator {op} has no form in Triton")
    inside = value.at(ATOM) if "{0}" in _CALLS[op] or op == "tanh" else value.text
    return Value(_CALLS[op].format(inside), axes, "fp32", inner)


def _plain(value: Value) -> str:
    return "fp32" if value.type == "const" else value.type


def _infix(op: str, args: Sequence[Value], axes: tuple[str, ...], inner: int) -> Value:
    symbol, level = _INFIX[op]
    if op in ("and", "or"):
        a, b = args
        text = f"{a.over(axes, level + 1)} {symbol} {b.over(axes, level + 1)}"
        return Value(text, axes, "i1", inner, level)
    kind, (a, b) = joined(args)
    if op == "div":
        kind, (a, b) = "fp32", [v.cast("fp32") if v.type in WHOLE else v for v in (a, b)]
        if b.type == "const" and math.isfinite(known := constant(b)) and known:
            symbol, b = "*", number(1.0 / known)
    text = f"{a.over(axes, level)} {symbol} {b.over(axes, level + 1)}"
    return Value(text, axes, "i1" if op in _TESTS else kind, inner, level)


def constant(value: Value) -> float:
    """The number that a constant's text names."""
    text = value.text.removeprefix('float("').removesuffix('")')
    return float(text)


def _where(args: Sequence[Value], axes: tuple[str, ...], inner: int) -> Value:
    test, yes, no = args
    if test.text in ("True", "False") and test.type == "i1":
        return yes if test.text == "True" else no
    kind, (a, b) = joined([yes, no]) if yes.type != "i1" or no.type != "i1" else ("i1", [yes, no])
    text = f"tl.where({test.over(axes, 0)}, {a.over(axes, 0)}, {b.over(axes, 0)})"
    return Value(text, axes, kind, inner)


def _power(base: Value, exponent: Value, axes: tuple[str, ...], inner: int) -> Value:
    base, exponent = base.real, exponent.real
    if base.type == "const" and constant(base) == 2.0:
        return Value(f"tl.exp2({exponent.cast('fp32').text})", axes, "fp32", inner)
    base = base.cast("fp32")
    known = constant(exponent) if exponent.type == "const" else None
    if known == 2.0:
        return Value(f"{base.at(ATOM)} * {base.at(ATOM)}", axes, "fp32", inner, PRODUCT)
    if known in (0.5, -0.5):
        return Value(f"tl.{'r' if known < 0 else ''}sqrt({base.text})", axes, "fp32", inner)
    if known == -1.0:
        return Value(f"1.0 / {base.at(ATOM)}", axes, "fp32", inner, PRODUCT)
    raise UnsupportedError(
        "a power other than a square, a root or one of two has no form in Triton"
    )


def _integral(op: str, args: Sequence[Value], axes: tuple[str, ...], inner: int) -> Value:
    kind, (a, b) = joined([_wider(arg) for arg in args])
    if kind not in WHOLE:
        raise UnsupportedError(f"{op} of numbers that are no integers has no form in Triton")
    if op in ("shift_right", "bits"):
        symbol = ">>" if op == "shift_right" else "&"
        return Value(f"({a.over(axes)} {symbol} {b.over(axes)})", axes, kind, inner)
    helper = "_floor_div" if op == "floordiv" else "_floor_mod"
    return Value(f"{helper}({a.over(axes, 0)}, {b.over(axes, 0)})", axes, kind, inner)


def _wider(value: Value) -> Value:
    """Bytes as integers of more than a byte, since it is their bits that are asked for."""
    if value.type in WHOLE and BYTES[value.type] == 1:
        return replace(value, text=f"{value.at(ATOM)}.to(tl.int32)", type="i32", level=ATOM)
    return value
