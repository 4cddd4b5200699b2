"""Takes expressions apart into terms, by one rule an operator.

A rule is a method named as its operator; it is asked only for what mixes streamed values with completed
reductions. Where there is no rule, or a rule does not apply, the factor is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from ...ir.cascade.expr import (
    Apply,
    Const,
    Expr,
    Ref,
    add,
    apply,
    is_number,
    mul,
    ranks_of,
    reads,
    walk,
)
from ...ir.cascade.operators import OPERATORS
from ...ir.cascade.printer import print_expr
from .intervals import bounds
from .scope import Kind, RefusedError, Scope
from .terms import Term, fraction, negation, plus, product_of, rebuild, spine, summed

#: Products of sums are multiplied out to at most this many terms.
_LIMIT = 64


@dataclass(frozen=True)
class Normaliser:
    """Takes expressions of a scope apart. Raises RefusedError, naming the factor, where it cannot."""

    scope: Scope

    def terms(self, expr: Expr) -> list[Term]:
        """The expression as a sum of terms."""
        if isinstance(expr, Const) and not isinstance(expr.value, bool):
            return [Term(float(expr.value))]
        kind = self.scope.kind(expr)
        if kind is Kind.FREE:
            return self._free(expr)
        if isinstance(expr, Apply) and expr.op == "exp":
            return self._exp(expr)
        if kind is Kind.ROW:
            return [Term(factors=((expr, Fraction(1)),))]
        if isinstance(expr, Ref):
            return self._inner_sum(expr)
        assert isinstance(expr, Apply)
        rule = getattr(self, f"_{expr.op}", None)
        if OPERATORS[expr.op].exact:
            return self.terms(expr.args[0])
        if rule is None:
            raise self.refuse(expr)
        found: list[Term] = rule(expr)
        if len(found) > _LIMIT:
            raise RefusedError(f"`{print_expr(expr)}` has too many terms to take apart", expr)
        return found

    def refuse(self, expr: Expr) -> RefusedError:
        """The refusal of a factor that no rule takes apart."""
        for part in walk(expr):
            tests = isinstance(part, Apply) and OPERATORS[part.op].truth
            if tests and self.scope.kind(part) is Kind.MIXED:
                return self._refuse_test(part)
        inner = self.scope.statements.get(expr.tensor) if isinstance(expr, Ref) else None
        if inner is not None:
            expr = inner.expr
        completed = [r.tensor for r in reads(expr) if self.scope.kind(r) is Kind.ROW]
        names = ", ".join(dict.fromkeys(completed)) or ", ".join(sorted(self.scope.needs_of(expr)))
        return RefusedError(
            f"`{print_expr(expr)}` mixes values along {self.scope.rank} with the completed {names}",
            expr,
        )

    def _refuse_test(self, test: Expr) -> RefusedError:
        test = self.scope.inline(test)
        return RefusedError(
            f"`{print_expr(test)}` is a test of values along {self.scope.rank} against completed reductions "
            "over it",
            test,
        )

    def _free(self, expr: Expr) -> list[Term]:
        """Free factors stay whole, but for what can leave the loop: factors and shifts without R."""
        whole = [Term(factors=((expr, Fraction(1)),))]
        if isinstance(expr, Apply) and expr.op == "exp":
            return [Term(exponent=((1.0, expr.args[0]),))]
        if not self.scope.carries(expr):
            return whole
        inside = self.scope.definition(expr, Kind.FREE)
        if inside is not None:
            found = self._free(inside)
            return found if any(self._leaves(term) for term in found) else whole
        if not isinstance(expr, Apply):
            return whole
        if OPERATORS[expr.op].exact:
            found = self._free(expr.args[0])
            return found if any(self._leaves(term) for term in found) else whole
        if expr.op == "mul":
            return product_of(self.terms(expr.args[0]), self.terms(expr.args[1]))
        if expr.op == "neg":
            return product_of([Term(-1.0)], self.terms(expr.args[0]))
        if expr.op == "div":
            below = self.terms(expr.args[1])
            inverse = below[0].power(Fraction(-1)) if len(below) == 1 else None
            return product_of(self.terms(expr.args[0]), [inverse]) if inverse else whole
        if expr.op in ("add", "sub") and any(self._is_shift(arg) for arg in expr.args):
            return self._sum(expr)
        return whole

    def _is_shift(self, expr: Expr) -> bool:
        """A tensor without R, such as the zero point of a channel."""
        return not self.scope.carries(expr) and bool(ranks_of(expr))

    def _leaves(self, term: Term) -> bool:
        return any(not self.scope.carries(base) for base, _ in term.factors)

    def _sum(self, expr: Apply) -> list[Term]:
        left, right = (self.terms(arg) for arg in expr.args)
        sign = Term(-1.0 if expr.op == "sub" else 1.0)
        return left + product_of([sign], right)

    def is_location(self, expr: Expr) -> bool:
        """A difference of streamed and completed values, kept whole to be folded around a centre."""
        parts = [part for _, part in spine(expr)]
        return len(parts) > 1 and all(self.scope.kind(part) is not Kind.MIXED for part in parts)

    def _add(self, expr: Apply) -> list[Term]:
        if self.is_location(expr):
            return [Term(factors=((expr, Fraction(1)),))]
        return self._sum(expr)

    _sub = _add

    def _neg(self, expr: Apply) -> list[Term]:
        return product_of([Term(-1.0)], self.terms(expr.args[0]))

    def _mul(self, expr: Apply) -> list[Term]:
        return product_of(self.terms(expr.args[0]), self.terms(expr.args[1]))

    def _div(self, expr: Apply) -> list[Term]:
        return product_of(self.terms(expr.args[0]), [self._power(expr.args[1], Fraction(-1))])

    def _abs(self, expr: Apply) -> list[Term]:
        """The size of a product of positive factors is the product: |exp(x - m)| is exp(x - m)."""
        found = self.terms(expr.args[0])
        known = self.scope.cascade, self.scope.statements
        signed = [
            base for term in found for base, _ in term.factors if bounds(base, *known).sign <= 0
        ]
        if len(found) != 1 or signed:
            raise self.refuse(expr)
        return [replace(found[0], coefficient=abs(found[0].coefficient))]

    def _sqrt(self, expr: Apply) -> list[Term]:
        return [self._power(expr.args[0], Fraction(1, 2))]

    def _pow(self, expr: Apply) -> list[Term]:
        exponent = expr.args[1]
        if not isinstance(exponent, Const):
            raise self.refuse(expr)
        power = fraction(float(exponent.value))
        if power.denominator == 1 and 0 <= power <= 4:
            found = [Term()]
            for _ in range(int(power)):
                found = product_of(found, self.terms(expr.args[0]))
            return found
        return [self._power(expr.args[0], power)]

    def _power(self, expr: Expr, power: Fraction) -> Term:
        if self.scope.kind(expr) is not Kind.MIXED:
            if isinstance(expr, Const):
                return Term(float(expr.value) ** float(power))
            return Term(factors=((expr, power),))
        found = self.terms(expr)
        raised = found[0].power(power) if len(found) == 1 else None
        if raised is None or not (power.denominator == 1 or self._splits(found[0])):
            raise self.refuse(expr)
        return raised

    def _splits(self, term: Term) -> bool:
        """Whether a root or logarithm goes through the product: sqrt(a b) is sqrt(a) sqrt(b), a, b >= 0."""
        if len(term.factors) <= 1 and all(power == 1 for _, power in term.factors):
            return True
        known = self.scope.cascade, self.scope.statements
        return all(bounds(base, *known).sign > 0 for base, _ in term.factors)

    def _where(self, expr: Apply) -> list[Term]:
        test, yes, no = expr.args
        if self.scope.kind(test) is Kind.MIXED:
            raise self._refuse_test(test)
        found: list[Term] = []
        for chosen, value in ((test, yes), (negation(test), no)):
            if not is_number(value, 0):
                found += product_of([Term(tests=(chosen,))], self.terms(value))
        return found

    def _inner_sum(self, expr: Ref) -> list[Term]:
        item = self.scope.statements[expr.tensor]
        if item.op != "sum":
            raise RefusedError(
                f"`{print_expr(expr)}`, a {item.op} inside the tile, depends on completed reductions",
                expr,
            )
        return [
            replace(t, over=t.over + item.over) for t in self.terms(self.scope.inline(item.expr))
        ]

    def _log(self, expr: Apply) -> list[Term]:
        found = self.terms(expr.args[0])
        if len(found) != 1 or found[0].tests or found[0].over or found[0].coefficient <= 0:
            raise self.refuse(expr)
        if not self._splits(found[0]):
            raise self.refuse(expr)
        whole: Expr = Const(0.0)
        for coefficient, addend in found[0].exponent:
            whole = plus(whole, coefficient, addend)
        for base, power in found[0].factors:
            if self.scope.kind(base) is Kind.MIXED:
                raise self.refuse(expr)
            whole = plus(whole, float(power), apply("log", base))
        if found[0].coefficient != 1:
            whole = add(whole, apply("log", found[0].coefficient))
        return self.terms(whole)

    def _exp(self, expr: Apply) -> list[Term]:
        choice = _choice(expr.args[0], self.scope)
        if choice is not None:
            test, yes, no = choice
            return self.terms(Apply("where", (test, apply("exp", yes), apply("exp", no))))
        mixed = self.scope.kind(expr) is Kind.MIXED
        found = Term(stabilised=mixed)
        for coefficient, addend in self.addends(expr.args[0]):
            found = replace(found, exponent=summed(found.exponent, coefficient, addend))
        return [found]

    def addends(self, expr: Expr) -> list[tuple[float, Expr]]:
        """The expression as a sum of free and row parts, rows written out where they are sums."""
        kind = self.scope.kind(expr)
        if kind is Kind.FREE:
            return [(1.0, expr)]
        if kind is Kind.ROW:
            inside = self.scope.definition(expr, Kind.ROW)
            if inside is not None and isinstance(inside, (Apply, Ref)) and _is_additive(inside):
                return self.addends(inside)
            if not isinstance(expr, Apply) or not _is_additive(expr):
                return [(1.0, expr)]
        parts = spine(expr)
        if len(parts) > 1 or parts[0][1] is not expr:
            return [(s * c, a) for s, part in parts for c, a in self.addends(part)]
        found = []
        for term in self.terms(expr):
            if term.tests or term.over or term.exponent:
                raise self.refuse(expr)
            found += self._distributed(term)
        return found

    def _distributed(self, term: Term) -> list[tuple[float, Expr]]:
        """A term under exp as free and row addends: a difference in it is multiplied by the rest."""
        mixed = [base for base, _ in term.factors if self.scope.kind(base) is Kind.MIXED]
        rest = rebuild(tuple(item for item in term.factors if item[0] not in mixed))
        parts: list[tuple[float, Expr]] = [(1.0, Const(1.0))]
        if mixed:
            if len(mixed) > 1 or dict(term.factors)[mixed[0]] != 1:
                raise self._refuse_under_exp(rebuild(term.factors), term)
            parts = self.addends(mixed[0])
        found = []
        for coefficient, part in parts:
            product = mul(part, rest)
            if self.scope.kind(product) is Kind.MIXED:
                raise self._refuse_under_exp(product, term)
            found.append((term.coefficient * coefficient, product))
        return found

    def _refuse_under_exp(self, product: Expr, term: Term) -> RefusedError:
        rows = [base for base, _ in term.factors if self.scope.kind(base) is not Kind.FREE]
        names = " * ".join(print_expr(base) for base in rows)
        return RefusedError(
            f"under exp, `{names}` (of completed reductions over {self.scope.rank}) multiplies values along "
            f"{self.scope.rank}: `{print_expr(product)}`",
            product,
        )


def _is_additive(expr: Expr) -> bool:
    return isinstance(expr, Ref) or (
        isinstance(expr, Apply) and (expr.op in ("add", "sub", "neg") or OPERATORS[expr.op].exact)
    )


def _choice(expr: Expr, scope: Scope) -> tuple[Expr, Expr, Expr] | None:
    """Lifts a mixed `where` out of a sum: f(where(c, a, b)) -> c, f(a), f(b)."""
    if not isinstance(expr, Apply) or scope.kind(expr) is not Kind.MIXED:
        return None
    if expr.op == "where":
        return expr.args[0], expr.args[1], expr.args[2]
    if expr.op in ("add", "sub", "neg") or OPERATORS[expr.op].exact:
        for at, arg in enumerate(expr.args):
            inner = _choice(arg, scope)
            if inner is not None:
                test, yes, no = inner
                args = [(*expr.args[:at], way, *expr.args[at + 1 :]) for way in (yes, no)]
                return test, Apply(expr.op, args[0]), Apply(expr.op, args[1])
    return None
