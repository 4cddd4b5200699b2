"""Scores taken apart as scale * product + bias, which is what attention kernels take.

where(pos(t) <= pos(s), scores * 0.25 + mask, -inf)
  -> scale 0.25, bias where(pos(t) <= pos(s), mask, -inf)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...ir.cascade.expr import Apply, Const, Expr, Ref, ranks_of, reads
from ...ir.cascade.plan import Plan
from .expressions import factors, on_real, simplified
from .frame import NotLoweredError
from .hiding import HIDDEN
from .one_tile import inlined

#: A number that stands in a score's place and that no score comes near.
_LOW = -1e9

#: Added to a score that could stand anywhere it leaves one that no other is below; bfloat16 has it too.
_LOWEST = Const(-1e38)


@dataclass(frozen=True)
class Choice:
    """Scores, with what is added to them, where they are seen; `hidden`, as it was written, elsewhere."""

    seen: Expr
    bias: Expr
    hidden: float


@dataclass(frozen=True)
class Logits:
    """L = scale * scores + bias, the scores a sum of products named `scores`.

    With `capped`, L = scale * tanh(capped * scores) + bias. `more` has products that
    stand beside the first in `scores`, each with its factor. `choices` has what of the bias stands in the
    place of scores; all else is added to it, -inf too.
    """

    scores: str
    scale: Expr
    bias: Expr
    choices: Mapping[Expr, Choice] = field(default_factory=dict)
    capped: Expr | None = None
    more: tuple[tuple[str, Expr], ...] = ()


def decomposed(plan: Plan, expr: Expr, values: Sequence[Expr]) -> Logits:
    """The scores as scale * product + bias; `values` is what is weighted by them.

    Raises NotLoweredError where they are not of that form.
    """
    expr = on_real(inlined(plan, expr))
    sums = _products(plan, values) or {item.name for item in plan.stream if item.op == "sum"}
    found = _Found(sums)
    scale, scores, bias = found.linear(expr)
    if scores is None:
        raise NotLoweredError("scores without a product")
    factors = (scale, *found.caps, *(factor for _, factor in found.more))
    if any(plan.rank in ranks_of(factor) for factor in factors):
        raise NotLoweredError("scores are scaled key by key")
    capped = found.caps[0] if found.caps else None
    return Logits(scores, scale, simplified(bias), found.choices, capped, tuple(found.more))


def _products(plan: Plan, values: Sequence[Expr]) -> set[str]:
    """The sums of products of a query and a key: the key has no rank that values at its place have not.

    A pair bias, a projection of something that is there for each row and key, is no such sum.
    """
    of_keys = {plan.rank}.union(*(ranks_of(inlined(plan, value)) for value in values))
    found = set()
    for item in plan.stream:
        parts = factors(on_real(inlined(plan, item.expr)))
        streamed = {
            rank for part in parts if plan.rank in ranks_of(part) for rank in ranks_of(part)
        }
        if item.op == "sum" and streamed - set(item.over) <= of_keys:
            found.add(item.name)
    return found


@dataclass
class _Found:
    """What is met on the way from the scores to the products that they are made of."""

    sums: set[str]
    choices: dict[Expr, Choice] = field(default_factory=dict)
    caps: list[Expr] = field(default_factory=list)
    more: list[tuple[str, Expr]] = field(default_factory=list)

    def linear(self, expr: Expr) -> tuple[Expr, str | None, Expr]:
        """(scale, name, bias) of scale * name + bias; a tanh leaves what it scales scores by in `caps`."""
        zero, one = Const(0.0), Const(1.0)
        if not any(read.tensor in self.sums for read in reads(expr)):
            return zero, None, expr
        if isinstance(expr, Ref):
            return one, expr.tensor, zero
        assert isinstance(expr, Apply)
        parts = [self.linear(arg) for arg in expr.args]
        if expr.op in ("mul", "div") and parts[-1][1] is None:
            scale, name, bias = parts[0]
            return _both(expr.op, scale, expr.args[1]), name, _both(expr.op, bias, expr.args[1])
        if expr.op == "mul" and parts[0][1] is None:
            scale, name, bias = parts[1]
            return _both("mul", scale, expr.args[0]), name, _both("mul", bias, expr.args[0])
        if expr.op in ("add", "sub") and parts[1][1] is None:
            scale, name, bias = parts[0]
            return scale, name, simplified(Apply(expr.op, (bias, expr.args[1])))
        if expr.op == "add":
            (scale, name, bias), (other, beside, more) = parts
            if name is not None and beside is not None and name != beside:
                self.more.append((beside, simplified(Apply("div", (other, scale)))))
                return scale, name, simplified(Apply("add", (bias, more)))
            if name is None:
                return other, beside, simplified(Apply("add", (expr.args[0], more)))
        if expr.op == "tanh" and not self.caps and parts[0][2] == zero:
            self.caps.append(parts[0][0])
            return one, parts[0][1], zero
        if expr.op == "where":
            return _hidden(expr, parts, self.choices)
        raise NotLoweredError(f"scores go through {expr.op}")


def _both(op: str, left: Expr, right: Expr) -> Expr:
    return simplified(Apply(op, (left, right))) if left != Const(0.0) else left


def _hidden(
    expr: Apply,
    parts: list[tuple[Expr, str | None, Expr]],
    choices: dict[Expr, Choice],
) -> tuple[Expr, str | None, Expr]:
    for at, other in ((1, 2), (2, 1)):
        value = expr.args[other]
        low = isinstance(value, Const) and float(value.value) <= (
            HIDDEN if _hides(parts[at][2]) else _LOW
        )
        if low and parts[at][1] is not None and parts[0][1] is None:
            scale, name, bias = parts[at]
            # Added where it was selected: lower than any that it may stand over, unless it has its place
            # in an order of several.
            assert isinstance(value, Const)
            hidden = float(value.value)
            if float(value.value) > float(_LOWEST.value) and not _hides(bias):
                value = _LOWEST
            args = (expr.args[0], bias, value) if at == 1 else (expr.args[0], value, bias)
            added = simplified(Apply("where", args))
            seen = expr.args[0] if at == 1 else _not(expr.args[0])
            choices[added] = Choice(seen, simplified(bias), hidden)
            return scale, name, added
    raise NotLoweredError("scores are chosen between")


def _not(test: Expr) -> Expr:
    inside = test.args[0] if isinstance(test, Apply) and test.op == "not" else None
    return inside if inside is not None else Apply("not", (test,))


def _hides(expr: Expr) -> bool:
    if isinstance(expr, Const):
        return float(expr.value) <= HIDDEN
    return any(_hides(arg) for arg in expr.args) if isinstance(expr, Apply) else False
