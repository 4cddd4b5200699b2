"""Cascade in, plan out: what folds, to which states, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from einfold.compiler.analysis.cascade.check import check_numbers
from einfold.compiler.analysis.cascade.fold import derive
from einfold.compiler.analysis.cascade.passes import count_passes
from einfold.compiler.analysis.cascade.plans import derive_checked
from einfold.compiler.fuse.explain import explain_function
from einfold.compiler.ir.cascade.parser import parse
from einfold.compiler.ir.cascade.plan_text import parse_plan, print_plan

from .texts import FLASH, HEADER, NAIVE, scores

SOFTMAX = """M[s] = QK[s, t] :: max(t)
E[s, t] = exp(QK[s, t] - M[s])
D[s] = E[s, t] :: sum(t)
P[s, t] = E[s, t] / D[s]
"""


def body(text: str, rank: str = "t") -> list[str]:
    """The lines of the one plan that say what is done."""
    plan = derive_checked(parse(text), rank).plan
    assert plan is not None
    assert parse_plan(print_plan(plan)) == plan
    lines = print_plan(plan).splitlines()[1:]
    return [line for line in lines if line.split()[0] not in ("rank", "input", "stream", "output")]


def test_the_paper_counts_three_passes_and_one() -> None:
    assert count_passes(parse(NAIVE), "t") == 3
    assert count_passes(parse(NAIVE), "d") == 1
    assert count_passes(parse(FLASH), "i") == 1


def test_softmax_becomes_flash_attention() -> None:
    assert body(NAIVE) == [
        "state GM[s] = QK[s, t] :: max(t)",
        "reference GM.ref[s] follows GM scale free",
        "state SD[s] = exp(QK[s, t] - GM.ref[s]) :: sum(t) under GM.ref",
        "correct SD = SD.old[s] * exp(GM.ref.old[s] - GM.ref[s])",
        "state AV.0[s, f] = exp(QK[s, t] - GM.ref[s]) * V[t, f] :: sum(t) under GM.ref",
        "correct AV.0 = AV.0.old[s, f] * exp(GM.ref.old[s] - GM.ref[s])",
        "finish AV[s, f] = AV.0[s, f] / SD[s]",
    ]


def test_a_second_maximum_is_the_first() -> None:
    text = scores(
        "N[s] = QK[s, t] :: max(t)\nZ[s, t] = QK[s, t] - N[s]\n"
        + SOFTMAX.replace("QK", "Z")
        + "O[s, f] = P[s, t] * V[t, f] :: sum(t)\n"
    )
    assert [line for line in body(text) if " max(" in line or "reference" in line] == [
        "state N[s] = QK[s, t] :: max(t)",
        "reference N.ref[s] follows N scale free",
    ]


def test_variance_is_kept_around_a_running_mean() -> None:
    lines = body(
        HEADER + "input x[s, t]\nm[s] = x[s, t] / size(t) :: sum(t)\n"
        "v[s] = (x[s, t] - m[s]) ** 2 :: sum(t)\noutput v\n"
    )
    assert "row m.run[s] = m.0[s] / plan.seen[]" in lines
    assert "reference m.mid[s] follows m.run centre" in lines
    assert any(line.startswith("correct v =") and "2 * (v.1.old[s]" in line for line in lines)


def test_two_centres_at_once() -> None:
    lines = body(
        HEADER + "input x[s, t]\ninput y[s, t]\nm[s] = x[s, t] / size(t) :: sum(t)\n"
        "n[s] = y[s, t] / size(t) :: sum(t)\n"
        "c[s] = (x[s, t] - m[s]) * (y[s, t] - n[s]) / size(t) :: sum(t)\noutput c\n"
    )
    assert sum(line.startswith("state c.") for line in lines) == 4


def test_what_has_no_rank_leaves_the_loop() -> None:
    text = scores(
        SOFTMAX + "O[s, f] = P[s, t] * ((V[t, f] - z[f]) * c[f]) :: sum(t)\n",
        "input z[f]\ninput c[f]\n",
    )
    lines = body(text)
    assert "state O.0[s, f] = exp(QK[s, t] - M.ref[s]) * V[t, f] :: sum(t) under M.ref" in lines
    assert not any("c[f]" in line or "z[f]" in line for line in lines if line.startswith("state"))


def test_a_softcap_needs_no_maximum() -> None:
    text = scores(
        "C[s, t] = where(pos(t) <= pos(s), tanh(QK[s, t] / 30) * 30, -inf)\n"
        + SOFTMAX.replace("QK", "C")
        + "O[s, f] = P[s, t] * V[t, f] :: sum(t)\n"
    )
    plan = derive_checked(parse(text), "t").plan
    assert plan is not None
    assert plan.references[0].static == 0
    fixed = plan.with_static_references()
    assert [state.name for state in fixed.states] == ["D", "O.0"]


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        ("where(pos(t) <= pos(s), tanh(QK[s, t]) * 30, -1e30)", "a finite mask may fill a row"),
        ("QK[s, t]", "inputs have no bounds"),
        ("tanh(QK[s, t]) * 100", "exp would lose rows 200 below"),
    ],
)
def test_no_static_reference_without_close_bounds(mask: str, why: str) -> None:
    text = scores(
        f"C[s, t] = {mask}\n"
        + SOFTMAX.replace("QK", "C")
        + "O[s, f] = P[s, t] * V[t, f] :: sum(t)\n"
    )
    plan = derive_checked(parse(text), "t").plan
    assert plan is not None
    assert plan.references[0].free and plan.references[0].static is None, why


def test_a_maximum_that_is_an_output_is_not_free() -> None:
    text = scores(SOFTMAX + "O[s, f] = P[s, t] * V[t, f] :: sum(t)\n", output="O M D")
    plan = derive_checked(parse(text), "t").plan
    assert plan is not None
    assert not plan.references[0].free


def test_one_maximum_under_two_names_is_one_reference() -> None:
    again = SOFTMAX.replace("M[", "M2[").replace("E[", "E2[").replace("D[", "D2[")
    text = scores(
        SOFTMAX + again.replace("P[", "P2[") + "O[s, f] = P[s, t] * V[t, f] :: sum(t)\n",
        output="O D2",
    )
    plan = derive_checked(parse(text), "t").plan
    assert plan is not None
    assert [(r.name, r.free) for r in plan.references] == [("M.ref", False)]


def test_log_sum_exp_leaves_the_maximum_free() -> None:
    text = scores(SOFTMAX + "L[s] = M[s] + log(D[s])\n", output="L")
    lines = body(text)
    assert "reference M.ref[s] follows M scale free" in lines
    # Written by hand it is NaN for a row without a live key, and stays so.
    assert "row D.live[s] = where(isfinite(M.ref[s]), D[s], nan)" in lines


REFUSED = {
    "threshold on the maximum": (
        SOFTMAX.replace(
            "= exp(QK[s, t] - M[s])", "= where(QK[s, t] > M[s] - 1, exp(QK[s, t] - M[s]), 0)"
        ),
        "QK[s, t] > M[s] - 1",
        "is a test of values along t",
    ),
    "dynamic rounding": (
        SOFTMAX.replace("E[s, t] / D[s]", "round(E[s, t] / D[s] * 127)"),
        "round(exp(QK[s, t] - M[s]) / D[s] * 127)",
        "with the completed M, D",
    ),
    "sigmoid of the reference": (
        SOFTMAX.replace("QK[s, t] - M[s]", "QK[s, t] * sigmoid(M[s])"),
        "QK[s, t] * sigmoid(M[s])",
        "under exp, `sigmoid(M[s])`",
    ),
    "relu of a difference": (
        SOFTMAX.replace("exp(QK[s, t] - M[s])", "relu(QK[s, t] - M[s])"),
        "relu(QK[s, t] - M[s])",
        "with the completed M",
    ),
    "lost stabiliser": (
        SOFTMAX.replace("max(t)", "sum(t)"),
        "exp(QK[s, t])",
        "the stabiliser was lost",
    ),
    "stabiliser divided away": (
        SOFTMAX.replace("exp(QK[s, t] - M[s])", "exp(QK[s, t] - M[s]) * exp(M[s])"),
        "exp(QK[s, t])",
        "the stabiliser was lost",
    ),
    "power of a difference": (
        SOFTMAX.replace("exp(QK[s, t] - M[s])", "sqrt(M[s] - QK[s, t])"),
        "M[s] - QK[s, t]",
        "is no polynomial in M",
    ),
    "epsilon inside a logarithm": (
        SOFTMAX.replace("E[s, t] / D[s]", "log(E[s, t] / D[s] + 1e-9)"),
        "log(",
        "with the completed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_factor(name: str) -> None:
    text, factor, reason = REFUSED[name]
    cascade = parse(scores(text + "O[s, f] = P[s, t] * V[t, f] :: sum(t)\n"))
    folding = derive_checked(cascade, "t")
    assert folding.plan is None
    assert folding.passes_after == 2 <= folding.passes_before
    assert factor in folding.refusals[0].factor or factor in folding.refusals[0].reason
    assert reason in folding.reason


def test_a_second_hop_takes_two_passes() -> None:
    first = SOFTMAX + "H[s, d] = P[s, t] * K[t, d] :: sum(d)\n".replace("sum(d)", "sum(t)")
    second = SOFTMAX.replace("QK", "Q2")
    for name in "MEDP":
        second = second.replace(f"{name}[", f"{name}2[")
    second += "O[s, f] = P2[s, t] * V[t, f] :: sum(t)\n"
    text = scores(first + "Q2[s, t] = H[s, d] * K[t, d] :: sum(d)\n" + second)
    folding = derive_checked(parse(text), "t")
    assert (folding.passes_before, folding.passes_after) == (6, 2)
    assert "with the completed H" in folding.reason
    assert folding.refusals[0].factor == "H[s, d] * K[t, d]"


def test_probabilities_as_an_output_take_two_passes() -> None:
    text = scores(SOFTMAX + "O[s, f] = P[s, t] * V[t, f] :: sum(t)\n", output="O P")
    folding = derive_checked(parse(text), "t")
    assert folding.passes_after == 2 and not folding.refusals
    assert folding.reason == "the output P carries t and needs the final statistics"


def test_scores_as_an_output_take_one() -> None:
    text = scores(SOFTMAX + "O[s, f] = P[s, t] * V[t, f] :: sum(t)\n", output="O QK")
    assert derive_checked(parse(text), "t").passes_after == 1


def test_nothing_to_fold() -> None:
    cascade = parse(scores("O[s, f] = sigmoid(QK[s, t]) * V[t, f] :: sum(t)\n"))
    folding = derive(cascade, "t")
    check_numbers(cascade, folding.plans)
    assert (folding.passes_before, folding.passes_after) == (1, 1)


@pytest.mark.parametrize("cap", [0, 20])
def test_sums_beside_a_mask_take_one_pass(cap: float) -> None:
    """Where no key was seen yet the log-sum-exp takes 0 for its maximum, which falls with the first key."""

    def attention(q: Tensor, k: Tensor, v: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        logits = q @ k.mT
        logits = torch.tanh(logits / cap) * cap if cap else logits
        logits = logits.masked_fill(~live, -math.inf)
        return torch.softmax(logits, dim=-1) @ v, logits.logsumexp(-1)

    torch.manual_seed(0)
    inputs = (torch.randn(2, 5, 8), torch.randn(2, 13, 8), torch.randn(2, 13, 8))
    report = explain_function(attention, (*inputs, torch.rand(5, 13) < 0.8))
    assert (report.status, report.passes_after) == ("fused", 1), report.reason
