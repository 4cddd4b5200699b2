"""Sums under references: H(r) * sum E(r) * B(x) * (x - r)^k, one term at a time.

E holds the exponentials of maxima and minima. It stays in the state, where it keeps numbers small, and
its change is the correction c = E(new)/E(old). Powers of a difference are kept around a running centre
and moved by Taylor's formula, exact for a polynomial (Welford's update is the case k = 2). H, all else
that is known only at the end, multiplies last: divide once.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import comb

from ...ir.cascade.cascade import Statement, statement
from ...ir.cascade.expr import Apply, Const, Expr, add, apply, mul, ranks_of, sub
from ...ir.cascade.plan import Reference, State
from ...ir.cascade.printer import print_expr
from .builder import Builder, old
from .scope import Kind, RefusedError
from .terms import Term, fraction, plus, rebuild, spine

Factors = tuple[tuple[Expr, Fraction], ...]


@dataclass(frozen=True)
class Split:
    """A term taken apart: what leaves the loop, what is streamed, what is subtracted."""

    outside: Factors
    inside: Factors
    exponent: tuple[tuple[float, Expr], ...]
    scale: Expr | None
    centres: tuple[tuple[Expr, Expr, int], ...]
    #: Tests of rows alone, or of what is known before, select at the end: what they hide may be 0/0.
    tests: tuple[Expr, ...]


def fold_sum(builder: Builder, item: Statement) -> None:
    """Adds the states of a sum and the row that puts them together. Raises RefusedError."""
    terms = builder.normaliser.terms(builder.scope.inline(item.expr))
    total: Expr = Const(0.0)
    splits = [split(builder, term) for term in terms]
    alone = len(terms) == 1
    for term, parts in zip(terms, splits, strict=True):
        state, left = _state(builder, item, term, parts, alone)
        value = rebuild(parts.outside, state.ref)
        for test in parts.tests:
            value = apply("where", test, value, 0.0)
        if left:
            ranks = builder.order(ranks_of(value) - set(left), item.ranks)
            part = statement(builder.name(f"{item.name}.sum"), ranks, value, "sum", left)
            builder.items.append(part)
            builder.scope.depend(part.name, builder.scope.needs_of(value))
            value = part.ref
        total = plus(total, term.coefficient, value)
    if total != item.ref:
        builder.items.append(statement(item.name, item.ranks, total))


def split(builder: Builder, term: Term) -> Split:
    """H, B, the exponent's streamed part, E's reference, and the centres."""
    outside: list[tuple[Expr, Fraction]] = []
    inside: list[tuple[Expr, Fraction]] = []
    centres = []
    for base, power in term.factors:
        if builder.scope.kind(base) is Kind.MIXED:
            centres.append(_centre(builder, base, power))
        elif builder.is_row(base) or not builder.scope.carries(base):
            outside.append((base, power))
        else:
            inside.append((base, power))
    streamed: list[tuple[float, Expr]] = []
    scale: Expr = Const(0.0)
    for coefficient, addend in term.exponent:
        if not builder.is_row(addend):
            streamed.append((coefficient, addend))
        elif all(builder.is_extreme(name) for name in builder.scope.needs_of(addend)):
            scale = plus(scale, -coefficient, addend)
        else:
            outside.append(_outer_exp(coefficient, addend))
    has_scale = scale != Const(0.0)
    if term.stabilised and not has_scale:
        shown = print_expr(rebuild(tuple((apply("exp", a), Fraction(1)) for _, a in streamed)))
        raise RefusedError(
            f"the stabiliser was lost: `{shown}` would be summed with no maximum subtracted",
            _exponential(term),
        )
    if has_scale and not streamed:
        # Nothing streamed stands under exp, so there is nothing to keep small.
        outside.append((apply("exp", apply("neg", scale)), Fraction(1)))
        has_scale = False
    kept = scale if has_scale else None
    tests = tuple(t for t in term.tests if builder.is_row(t) or not builder.scope.carries(t))
    return Split(tuple(outside), tuple(inside), tuple(streamed), kept, tuple(centres), tests)


def _exponential(term: Term) -> Expr:
    """The exponent of a term as an expression, to name it."""
    total: Expr = Const(0.0)
    for coefficient, addend in term.exponent:
        total = plus(total, coefficient, addend)
    return apply("exp", total)


def _outer_exp(coefficient: float, addend: Expr) -> tuple[Expr, Fraction]:
    if isinstance(addend, Apply) and addend.op == "log":
        return addend.args[0], fraction(coefficient)
    return apply("exp", plus(Const(0.0), coefficient, addend)), Fraction(1)


def _centre(builder: Builder, base: Expr, power: Fraction) -> tuple[Expr, Expr, int]:
    """base^power with base = x - r, as (x, r, power)."""
    if power.denominator != 1 or power < 0:
        raise RefusedError(
            f"`{print_expr(base)}` to the power {power} is no polynomial in "
            f"{', '.join(sorted(builder.scope.needs_of(base)))}",
            base,
        )
    streamed: Expr = Const(0.0)
    row: Expr = Const(0.0)
    for sign, part in spine(base):
        if builder.is_row(part):
            row = plus(row, -sign, part)
        else:
            streamed = plus(streamed, sign, part)
    return streamed, row, int(power)


def _state(
    builder: Builder, item: Statement, term: Term, parts: Split, alone: bool
) -> tuple[State, tuple[str, ...]]:
    """The state of a term, and the ranks of its sum that are left to the finish."""
    over = (*item.over, *(r for r in term.over if r not in item.over))
    if len(set(item.over) & set(term.over)) or set(term.over) & set(item.ranks):
        raise RefusedError(f"{item.name} sums twice over one rank", item.expr)
    rows = ranks_of(rebuild(parts.outside)).union(*(ranks_of(test) for test in parts.tests))
    scale = None
    if parts.scale is not None:
        scale = builder.reference("scale", parts.scale, item.ranks)
        rows |= set(scale.ranks)
    centres = [builder.reference("centre", row, item.ranks) for _, row, _ in parts.centres]
    for centre in centres:
        rows |= set(centre.ranks)
    left = tuple(rank for rank in over if rank in rows)
    kept = tuple(rank for rank in over if rank not in rows)
    references = [scale, *centres] if scale is not None else centres
    exact = alone and not parts.outside and not parts.tests and not left and term.coefficient == 1
    # The highest power comes last: its correction reads those below it.
    powers = [power for *_, power in parts.centres]
    family: dict[tuple[int, ...], State] = {}
    for index in product(*(range(power + 1) for power in powers)):
        top = list(index) == powers
        body = _body(term, parts, scale, centres, index)
        used = _used(index, scale, centres)
        ranks = builder.order(_ranks_under(body, references, used) - set(kept), item.ranks)
        wanted = item.name if exact and top else f"{item.name}.{''.join(map(str, index)) or 0}"
        state = builder.state(wanted, "sum", kept, body, ranks, used)
        family[index] = state
    for index, state in family.items():
        if state.correct is None and state.references:
            builder.correct(state, _correction(family, index, scale, centres))
    last = tuple(powers)
    found = next(s for s in builder.items if isinstance(s, State) and s.name == family[last].name)
    return found, left


def _ranks_under(body: Expr, references: list[Reference], used: tuple[str, ...]) -> set[str]:
    return set(ranks_of(body)).union(*(r.ranks for r in references if r.name in used))


def _used(
    index: tuple[int, ...], scale: Reference | None, centres: list[Reference]
) -> tuple[str, ...]:
    found = [scale.name] if scale is not None else []
    found += [c.name for c, power in zip(centres, index, strict=True) if power]
    return tuple(dict.fromkeys(found))


def _body(
    term: Term,
    parts: Split,
    scale: Reference | None,
    centres: list[Reference],
    index: tuple[int, ...],
) -> Expr:
    """What is summed: exp(streamed - scale) * B * (x - centre)^k, 0 where a test fails."""
    value: Expr = Const(1.0)
    if parts.exponent:
        inside: Expr = Const(0.0)
        for coefficient, addend in parts.exponent:
            inside = plus(inside, coefficient, addend)
        value = apply("exp", inside if scale is None else sub(inside, scale.ref))
    for (streamed, _, _), centre, power in zip(parts.centres, centres, index, strict=True):
        for _ in range(power):
            value = mul(value, sub(streamed, centre.ref))
    value = rebuild(parts.inside, value)
    for test in term.tests:
        if test not in parts.tests:
            value = apply("where", test, value, 0.0)
    return value


def _correction(
    family: dict[tuple[int, ...], State],
    index: tuple[int, ...],
    scale: Reference | None,
    centres: list[Reference],
) -> Expr:
    """c * sum over j <= index of binomials * (old centre - new centre)^j * (old state of index - j)."""
    total: Expr = Const(0.0)
    for lower in product(*(range(power + 1) for power in index)):
        state = family[lower]
        piece: Expr = old(state.name, state.ranks)
        factor = 1
        for centre, power, kept in zip(centres, index, lower, strict=True):
            factor *= comb(power, kept)
            moved = sub(old(centre.name, centre.ranks), centre.ref)
            for _ in range(power - kept):
                piece = mul(piece, moved)
        total = add(mul(Const(float(factor)), piece), total)
    if scale is None:
        return total
    return mul(total, apply("exp", sub(old(scale.name, scale.ranks), scale.ref)))
