"""The normal form that folding works on: a sum of products of powers, one exponential, and tests.

    term = coefficient * factor^power * ... * exp(addend + ...) where test and ...

Only what mixes streamed values with completed reductions is taken apart. What is free or row stays one
factor, so that nothing is expanded that need not be, and a difference `x - r` stays a difference: it is
folded around a centre, never multiplied out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from ...ir.cascade.expr import (
    ONE,
    Apply,
    Const,
    Expr,
    add,
    apply,
    div,
    mul,
    sub,
)
from ...ir.cascade.operators import OPERATORS


@dataclass(frozen=True)
class Term:
    """One product. `exponent` sums coefficient * addend; `over` has the ranks of sums inside.

    `stabilised` remembers that a streamed value stood under exp together with a reference.
    """

    coefficient: float = 1.0
    factors: tuple[tuple[Expr, Fraction], ...] = ()
    exponent: tuple[tuple[float, Expr], ...] = ()
    tests: tuple[Expr, ...] = ()
    over: tuple[str, ...] = ()
    stabilised: bool = False

    def times(self, other: Term) -> Term:
        """The product of two terms."""
        powers = dict(self.factors)
        for base, power in other.factors:
            powers[base] = powers.get(base, Fraction(0)) + power
        exponent = self.exponent
        for coefficient, addend in other.exponent:
            exponent = summed(exponent, coefficient, addend)
        return Term(
            self.coefficient * other.coefficient,
            tuple((base, power) for base, power in powers.items() if power),
            exponent,
            self.tests + tuple(test for test in other.tests if test not in self.tests),
            self.over + other.over,
            self.stabilised or other.stabilised,
        )

    def power(self, power: Fraction) -> Term | None:
        """The term to a power, or None where that has no such form."""
        if (self.tests or self.over) and power != 1:
            return None
        if self.coefficient < 0 and power.denominator != 1:
            return None
        if self.coefficient == 0 and power < 0:
            return None
        return replace(
            self,
            coefficient=float(self.coefficient ** float(power)),
            factors=tuple((base, p * power) for base, p in self.factors),
            exponent=tuple((c * float(power), a) for c, a in self.exponent),
        )


def summed(
    exponent: tuple[tuple[float, Expr], ...], coefficient: float, addend: Expr
) -> tuple[tuple[float, Expr], ...]:
    """An exponent with one more addend."""
    merged = {a: c for c, a in exponent}
    merged[addend] = merged.get(addend, 0.0) + coefficient
    return tuple((c, a) for a, c in merged.items() if c)


def product_of(a: list[Term], b: list[Term]) -> list[Term]:
    """Every term of one sum times every term of the other."""
    return [x.times(y) for x in a for y in b]


def negation(test: Expr) -> Expr:
    """not test, without a double negation."""
    if isinstance(test, Apply) and test.op == "not":
        return test.args[0]
    return apply("not", test)


def fraction(value: float) -> Fraction:
    """A float as a fraction, the simple one where it is that very float."""
    simple = Fraction(value).limit_denominator(64)
    return simple if float(simple) == value else Fraction(value)


def spine(expr: Expr, sign: float = 1.0) -> list[tuple[float, Expr]]:
    """The addends of a sum, as written, with their signs; float casts between them are passed through."""
    if isinstance(expr, Apply):
        if expr.op in ("add", "sub"):
            other = sign if expr.op == "add" else -sign
            return spine(expr.args[0], sign) + spine(expr.args[1], other)
        if expr.op == "neg":
            return spine(expr.args[0], -sign)
        if OPERATORS[expr.op].exact:
            return spine(expr.args[0], sign)
    return [(sign, expr)]


def plus(total: Expr, coefficient: float, addend: Expr) -> Expr:
    """total + coefficient * addend."""
    if coefficient == 1:
        return add(total, addend)
    if coefficient == -1:
        return sub(total, addend)
    return add(total, mul(Const(coefficient), addend))


def rebuild(factors: tuple[tuple[Expr, Fraction], ...], start: Expr = ONE) -> Expr:
    """`start` times a product of powers; what has a negative power stands below one division."""
    above = start
    below: Expr = Const(1.0)
    for base, power in factors:
        size = abs(power)
        if size.denominator == 1 and size <= 4:
            piece = base
            for _ in range(int(size) - 1):
                piece = mul(piece, base)
        elif size == Fraction(1, 2):
            piece = apply("sqrt", base)
        else:
            piece = apply("pow", base, float(size))
        above, below = (mul(above, piece), below) if power > 0 else (above, mul(below, piece))
    return div(above, below)
