"""A wrong fold does not get past the checks: plans are damaged in every place, and each damage is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from einfold.compiler.analysis.cascade.check import (
    WrongFoldError,
    check_corrections,
    check_numbers,
)
from einfold.compiler.analysis.cascade.plans import derive_checked
from einfold.compiler.ir.cascade.expr import Apply, Const, Expr, apply, rewrite
from einfold.compiler.ir.cascade.parser import parse
from einfold.compiler.ir.cascade.plan import Plan, Reference, State, Step

from .texts import HEADER, NAIVE, scores

MOMENTS = scores(
    "M[s] = QK[s, t] :: max(t)\nE[s, t] = exp(QK[s, t] - M[s])\nD[s] = E[s, t] :: sum(t)\n"
    "P[s, t] = E[s, t] / D[s]\nO[s, f] = P[s, t] * V[t, f] :: sum(t)\n"
    "W[s, f] = P[s, t] * (V[t, f] - O[s, f]) ** 2 :: sum(t)\n"
    "H[s] = -P[s, t] * log(P[s, t]) :: sum(t)\n",
    output="O W H",
)
NORM = (
    HEADER + "input x[s, t]\ninput w[f, t]\nm[s] = x[s, t] / size(t) :: sum(t)\n"
    "v[s] = (x[s, t] - m[s]) ** 2 / size(t) :: sum(t)\n"
    "n[s, t] = (x[s, t] - m[s]) / sqrt(v[s] + 0.00001)\ny[s, f] = n[s, t] * w[f, t] :: sum(t)\noutput y\n"
)
TEXTS = {"softmax": NAIVE, "moments": MOMENTS, "norm": NORM}


def plan_of(name: str) -> Plan:
    plan = derive_checked(parse(TEXTS[name]), "t").plan
    assert plan is not None
    return plan


def with_step(plan: Plan, at: int, step: Step) -> Plan:
    return replace(plan, steps=(*plan.steps[:at], step, *plan.steps[at + 1 :]))


def found_by(check: Callable[..., None], *args: object) -> bool:
    try:
        check(*args)
    except WrongFoldError:
        return True
    return False


def damaged(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """The plan with one thing wrong, for every place where that can be."""
    for at, step in enumerate(plan.steps):
        if not isinstance(step, State):
            continue
        for op in {"sum", "max", "min"} - {step.op}:
            yield f"{step.name} {op} for {step.op}", with_step(plan, at, replace(step, op=op))
        yield (
            f"{step.name} doubled",
            with_step(plan, at, replace(step, body=apply("mul", step.body, 2.0))),
        )
        if step.correct is not None:
            yield f"{step.name} uncorrected", with_step(plan, at, replace(step, correct=None))
            for number, changed in enumerate(_changed(step.correct)):
                yield (
                    f"{step.name} correction {number}",
                    with_step(plan, at, replace(step, correct=changed)),
                )


def _changed(expr: Expr) -> Iterator[Expr]:
    """The correction with the sign of a difference turned, a factor left out, or a number changed."""
    parts: list[Expr] = []

    def collect(part: Expr) -> None:
        parts.append(part)
        if isinstance(part, Apply):
            for arg in part.args:
                collect(arg)

    collect(expr)
    for part in parts:
        if isinstance(part, Apply) and part.op == "sub":
            turned = Apply("sub", part.args[::-1])
            yield _swap(expr, part, turned)
        elif isinstance(part, Apply) and part.op == "exp":
            yield _swap(expr, part, Const(1.0))
        elif isinstance(part, Const):
            yield _swap(expr, part, Const(float(part.value) + 1))


def _swap(expr: Expr, old: Expr, new: Expr) -> Expr:
    return rewrite(expr, lambda part: new if part == old else None)


@pytest.mark.parametrize("name", TEXTS)
def test_every_damage_is_found(name: str) -> None:
    plan = plan_of(name)
    cascade = parse(TEXTS[name]).pruned()
    count = 0
    for what, wrong in damaged(plan):
        count += 1
        assert found_by(check_corrections, wrong) or found_by(check_numbers, cascade, (wrong,)), (
            what
        )
    assert count > 8


@pytest.mark.parametrize("name", TEXTS)
def test_the_algebra_alone_finds_wrong_corrections(name: str) -> None:
    for what, wrong in damaged(plan_of(name)):
        if "correct" in what:
            with pytest.raises(WrongFoldError, match=what.split()[0]):
                check_corrections(wrong)


@pytest.mark.parametrize("name", TEXTS)
def test_the_numbers_alone_find_them_too(name: str) -> None:
    cascade = parse(TEXTS[name]).pruned()
    for what, wrong in damaged(plan_of(name)):
        if "uncorrected" in what or " for " in what:
            assert found_by(check_numbers, cascade, (wrong,)), what


def test_a_reference_that_is_called_free_and_is_not() -> None:
    cascade = parse(MOMENTS.replace("output O\n", "output O\noutput D\n"))
    plan = derive_checked(cascade, "t").plan
    assert plan is not None
    at, found = next((i, s) for i, s in enumerate(plan.steps) if isinstance(s, Reference))
    assert not found.free
    with pytest.raises(WrongFoldError, match="lazy"):
        check_numbers(cascade, (with_step(plan, at, replace(found, free=True)),))


def test_a_centre_is_checked_for_what_it_reads() -> None:
    plan = plan_of("norm")
    at, found = next((i, s) for i, s in enumerate(plan.steps) if isinstance(s, Reference))
    wrong = with_step(plan, at, replace(found, source=plan.states[0].name))
    with pytest.raises(WrongFoldError):
        check_numbers(parse(NORM).pruned(), (wrong,))
