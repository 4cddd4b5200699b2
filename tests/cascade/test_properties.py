"""Whatever folding makes of a cascade computes what the cascade computes, however it is cut to tiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

from einfold.compiler.analysis.cascade.check import (
    check_corrections,
    check_numbers,
    random_inputs,
    random_sizes,
    run_plans,
)
from einfold.compiler.analysis.cascade.fold import derive
from einfold.compiler.analysis.cascade.plans import derive_checked
from einfold.compiler.ir.cascade.cascade import Cascade
from einfold.compiler.ir.cascade.evaluate import evaluate
from einfold.compiler.ir.cascade.parser import parse
from einfold.compiler.ir.cascade.plan_text import parse_plan, print_plan
from einfold.compiler.ir.cascade.printer import print_cascade, print_expr
from einfold.compiler.ir.cascade.run_plan import Runner
from einfold.compiler.ir.cascade.verifier import verify

from .random_cascades import cascades
from .texts import HEADER, scores

SLOW = settings(max_examples=60, suppress_health_check=list(HealthCheck))


@SLOW
@given(cascades(), st.integers(0, 2**32 - 1))
def test_random_cascades_in_random_tiles(cascade: Cascade, seed: int) -> None:
    assume("t" in cascade.ranks)
    note(print_cascade(cascade))
    verify(cascade)
    assert print_cascade(parse(print_cascade(cascade))) == print_cascade(cascade)
    folding = derive_checked(cascade, "t")
    assert folding.passes_after <= folding.passes_before
    for plan in folding.plans:
        assert parse_plan(print_plan(plan)) == plan
    if not folding.plans:
        assert "without a live key" in folding.reason
        return
    random = np.random.default_rng(seed)
    sizes = random_sizes(cascade, random, most=9)
    arrays = random_inputs(cascade, random, sizes)
    expected = evaluate(cascade, arrays, sizes)
    for way in ("sequence", "tree", "lazy", "static"):
        found = run_plans(folding.plans, arrays, random, way, sizes)
        for name in cascade.outputs:
            scale = 1 + np.max(np.abs(expected[name]), where=np.isfinite(expected[name]), initial=0)
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-8, atol=1e-8 * scale)


ATTENTION = scores(
    "S[s, t] = where(live[s, t], QK[s, t] * 40, {mask})\n"
    "M[s] = S[s, t] :: max(t)\nE[s, t] = exp(S[s, t] - M[s])\nD[s] = E[s, t] :: sum(t)\n"
    "P[s, t] = E[s, t] / D[s]\nO[s, f] = P[s, t] * V[t, f] :: sum(t)\n"
    "W[s, f] = P[s, t] * (V[t, f] - O[s, f]) ** 2 :: sum(t)\n"
    "L[s] = M[s] + log(D[s])\nH[s] = -P[s, t] * (S[s, t] - L[s]) :: sum(t)\n",
    "input live[s, t] : bool\n",
    "O W H L",
)


def attention_inputs(seed: int, size: float) -> dict[str, np.ndarray]:
    """Scores up to about `size`, the first row without a live key, the second with one alone."""
    random = np.random.default_rng(seed)
    live = random.random((5, 11)) < 0.5
    live[0], live[1] = False, False
    live[1, 4] = live[2, 0] = True
    q, k = random.normal(size=(5, 3)), random.normal(size=(11, 3))
    q *= size / 40 / np.abs(q @ k.T).max()
    return {"Q": q, "K": k, "V": random.normal(size=(11, 4)), "live": live}


@pytest.mark.parametrize("mask", ["-inf", "-1e30"])
@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("way", ["one", "each", "sequence", "tree", "lazy"])
def test_edges(mask: str, size: float, way: str) -> None:
    """Rows without a live key, masks of -inf and -1e30, logits to 1e4, tiles of one element and of all."""
    cascade = parse(ATTENTION.format(mask=mask))
    plan = derive_checked(cascade, "t").plan
    assert plan is not None
    for seed in range(3):
        arrays = attention_inputs(seed, size)
        expected = evaluate(cascade, arrays)
        if way in ("one", "each"):
            runner = Runner.of(plan, arrays)
            every = np.arange(11)
            tiles = [every] if way == "one" else [every[i : i + 1] for i in every]
            found = runner.in_sequence(tiles)
        else:
            found = run_plans((plan,), arrays, np.random.default_rng(seed), way)
        for name in cascade.outputs:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-9 * size)
        assert np.isnan(found["O"][0]).all() == (mask == "-inf")


def test_dead_rows_can_be_zero_by_policy() -> None:
    text = ATTENTION.format(mask="-inf").replace("cascade 1\n", "cascade 1\ndead rows zero\n")
    cascade = parse(text)
    assert print_cascade(cascade) == text
    plan = derive_checked(cascade, "t").plan
    assert plan is not None and plan.dead == "zero"
    found = run_plans((plan,), attention_inputs(0, 1.0), np.random.default_rng(0))
    assert (found["O"][0] == 0).all() and np.isfinite(found["O"]).all()


def test_a_mean_far_from_zero_keeps_its_variance() -> None:
    """Centred states: 1e8 plus unit noise has variance 1 to many digits, in any tiling."""
    cascade = parse(
        HEADER + "input x[s, t]\nm[s] = x[s, t] / size(t) :: sum(t)\n"
        "v[s] = (x[s, t] - m[s]) ** 2 / size(t) :: sum(t)\noutput v\n"
    ).pruned()
    plan = derive_checked(cascade, "t").plan
    assert plan is not None
    random = np.random.default_rng(0)
    x = 1e8 + random.normal(size=(2, 200))
    for way in ("sequence", "tree"):
        found = run_plans((plan,), {"x": x}, random, way)["v"]
        np.testing.assert_allclose(found, x.var(1), rtol=1e-6)


@SLOW
@given(cascades())
def test_checks_do_not_depend_on_the_seed(cascade: Cascade) -> None:
    assume("t" in cascade.ranks)
    folding = derive(cascade, "t")
    for plan in folding.plans:
        check_corrections(plan)
    check_numbers(cascade, folding.plans, seed=7)


def test_checks_know_a_sum_that_was_taken_apart() -> None:
    """The mean of x + c is kept as one of x: changing x + c under the exp changes the cascade alone."""
    cascade = parse(
        HEADER + "input x[s, t]\ninput c[s]\na[s, t] = x[s, t] + c[s]\nm[s] = a[s, t] :: max(t)\n"
        "e[s, t] = exp(a[s, t] - m[s])\nd[s] = e[s, t] :: sum(t)\n"
        "mean[s] = a[s, t] / size(t) :: sum(t)\noutput mean\noutput d\n"
    )
    plan = derive_checked(cascade, "t").plan
    assert plan is not None
    assert any("x[s, t]" in print_expr(state.body) for state in plan.states)
