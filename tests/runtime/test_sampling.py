from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from einfold.errors import RecipeError
from einfold.runtime.sampling import Sampler, Sampling

NONE = np.array([], np.int64)
LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], np.float32))


def draws(settings: Sampling, count: int = 4000) -> np.ndarray:  # type: ignore[type-arg]
    sampler = Sampler(settings)
    return np.bincount([sampler.pick(LOGITS, NONE, []) for _ in range(count)], minlength=5) / count


def test_temperature_zero_takes_the_likeliest() -> None:
    assert Sampler(Sampling()).pick(LOGITS, NONE, []) == 0


def test_temperature_one_draws_by_the_probabilities() -> None:
    np.testing.assert_allclose(draws(Sampling(temperature=1.0, seed=0)), np.exp(LOGITS), atol=0.03)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (Sampling(temperature=1.0, top_k=2, seed=0), 2),
        (Sampling(temperature=1.0, top_p=0.7, seed=0), 2),
        (Sampling(temperature=1.0, top_p=0.76, seed=0), 3),
        (Sampling(temperature=1.0, min_p=0.2, seed=0), 3),
        (Sampling(temperature=1.0, top_k=4, top_p=0.999, min_p=0.14, seed=0), 4),
        (Sampling(temperature=1.0, top_p=1e-9, seed=0), 1),
    ],
)
def test_filters_keep_the_likeliest_and_renormalise(settings: Sampling, kept: int) -> None:
    share = draws(settings)
    want = np.exp(LOGITS) * (np.arange(5) < kept)
    np.testing.assert_allclose(share, want / want.sum(), atol=0.03)
    assert share[kept:].sum() == 0


def test_low_temperature_sharpens() -> None:
    assert draws(Sampling(temperature=0.2, seed=0))[0] > 0.95


@pytest.mark.filterwarnings("error")
def test_a_tiny_temperature_takes_the_likeliest() -> None:
    assert draws(Sampling(temperature=1e-310, seed=0), 10)[0] == 1


def test_repetition_penalty_on_both_signs() -> None:
    logits = np.array([1.0, 0.9, -0.5, -0.4], np.float32)
    assert Sampler(Sampling(repetition_penalty=1.3)).pick(logits, np.array([0]), []) == 1
    assert Sampler(Sampling(repetition_penalty=1.3)).pick(-np.abs(logits[2:]), NONE, [1]) == 0


@given(
    st.integers(0, 2**31),
    st.floats(0.01, 5),
    st.integers(0, 8),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_a_seed_repeats_a_draw(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    settings = Sampling(1.0, temperature, top_k, top_p, min_p, seed)
    logits = np.random.default_rng(seed).standard_normal(50).astype(np.float32) * 5
    picks = [
        [sampler.pick(logits, NONE, []) for _ in range(5)]
        for sampler in (Sampler(settings), Sampler(settings))
    ]
    assert picks[0] == picks[1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"temperature": float("inf")},
        {"repetition_penalty": float("nan")},
        {"seed": -1},
    ],
)
def test_impossible_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        Sampling(**wrong)  # type: ignore[arg-type]
