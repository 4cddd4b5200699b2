"""SymPy as a tool: expressions are translated into it, questions are asked, nothing comes back.

No rewriting by SymPy reaches a plan, so it cannot turn a stable form into an unstable one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from random import Random
from typing import Any

import sympy as sp

from ...ir.cascade.cascade import Statement
from ...ir.cascade.expr import Apply, Const, Expr, Ref, Size
from ...ir.cascade.operators import OPERATORS
from ...ir.cascade.plan import Reference

#: Random points at which a difference must vanish, and to how many digits.
_POINTS, _DIGITS = 3, 40


@dataclass
class Translator:
    """Expressions as SymPy's. Reads become symbols, what SymPy need not look into becomes one too."""

    values: dict[str, Any] = field(default_factory=dict)
    _atoms: dict[object, Any] = field(default_factory=dict)

    def atom(self, key: object) -> Any:
        """The positive symbol that stands for a part, the same for an equal part."""
        if key not in self._atoms:
            self._atoms[key] = sp.Symbol(f"x{len(self._atoms)}", positive=True)
        return self._atoms[key]

    def expr(self, expr: Expr) -> Any:
        """The expression for SymPy."""
        if isinstance(expr, Const):
            value = float(expr.value)
            return sp.Rational(Fraction(value)) if abs(value) < 1e300 else self.atom(expr)
        if isinstance(expr, Ref):
            return self.values.get(expr.tensor, self.atom(expr))
        if isinstance(expr, Size):
            return self.atom(expr)
        if not isinstance(expr, Apply):
            return self.atom(expr)
        return self._apply(expr)

    def _apply(self, expr: Apply) -> Any:
        args = [self.expr(arg) for arg in expr.args]
        if OPERATORS[expr.op].exact:
            return args[0]
        rule = _RULES.get(expr.op)
        if rule is not None:
            return rule(*args)
        if expr.op == "where" and expr.args[2] == Const(0.0):
            # The test holds or the term is absent: an indicator, linear in the value.
            return self.atom(("test", args[0])) * args[1]
        return (
            self.atom((expr.op, *args))
            if not _varying(args, self.values)
            else self._opaque(expr.op, args)
        )

    def _opaque(self, op: str, args: Sequence[Any]) -> Any:
        return sp.Function(f"f_{op}", real=True)(*args)


def _varying(args: Iterable[Any], values: Mapping[str, Any]) -> bool:
    symbols = set().union(*(value.free_symbols for value in values.values())) if values else set()
    return any(getattr(arg, "free_symbols", set()) & symbols for arg in args)


_RULES: dict[str, Any] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "neg": lambda a: -a,
    "exp": sp.exp,
    "log": sp.log,
    "sqrt": sp.sqrt,
}


def is_zero(value: Any) -> bool:
    """Whether a SymPy expression vanishes: by expansion, or else at random points to 40 digits."""
    if value == 0 or sp.expand(value) == 0:
        return True
    random = Random(0)
    symbols = sorted(value.free_symbols, key=str)
    for _ in range(_POINTS):
        point = {s: sp.Rational(random.randint(1, 300), 100) for s in symbols}
        try:
            found = value.subs(point).evalf(_DIGITS)
            if not found.is_number or abs(found) > sp.Float(10) ** (5 - _DIGITS):
                return False
        except (TypeError, ValueError, ZeroDivisionError):
            return False
    return True


def is_free_of(
    reference: Reference, scaled: set[str], rows: Sequence[Statement], outputs: Sequence[str]
) -> bool:
    """Whether outputs stay the same when a reference moves and the states under it are rescaled.

    `scaled` are states proportional to exp(-reference). A sum over a rank that the reference carries
    must have each of its summands free.
    """
    move = sp.Symbol("move", real=True)
    translator = Translator()
    translator.values[reference.name] = translator.atom(reference.name) + move
    for name in scaled:
        translator.values[name] = translator.atom(("state", name)) * sp.exp(-move)
    for row in rows:
        value = translator.expr(row.expr)
        mixes = set(row.over) & set(reference.ranks)
        if (mixes or row.op in ("max", "min")) and not is_zero(sp.diff(value, move)):
            return False
        if move in getattr(value, "free_symbols", set()):
            translator.values[row.name] = value
        else:
            translator.values[row.name] = translator.atom(("row", row.name))
    found = [translator.values[name] for name in outputs if name in translator.values]
    return all(is_zero(sp.diff(value, move)) for value in found)
