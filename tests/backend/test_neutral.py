"""x + 0, x * 1, x / 1, x ** 1 and x - 0 are gone before the algebra: the cascade is the one without them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import einfold
from einfold import backend

NEUTRAL: dict[str, Callable[[Tensor], Tensor]] = {
    "x + 0.0": lambda x: x + 0.0,
    "0 + x": lambda x: 0 + x,
    "add with a factor": lambda x: torch.add(x, 0, alpha=3),
    "x - 0": lambda x: x - 0,
    "x * 1": lambda x: x * 1,
    "1.0 * x": lambda x: 1.0 * x,
    "x / 1": lambda x: x / 1,
    "x ** 1": lambda x: x**1,
    "in place": lambda x: (x * 1).add_(0.0),
    "all of them": lambda x: ((0.0 + (x - 0.0) / 1.0) * 1.0) ** 1.0,
}


def entropy(x: Tensor, neutral: Callable[[Tensor], Tensor]) -> Tensor:
    """The logarithm of a probability folds where it stands alone under it."""
    p = torch.softmax(x, -1)
    return -(p * torch.log(neutral(p))).sum(-1)


def attention(x: Tensor, neutral: Callable[[Tensor], Tensor]) -> Tensor:
    return neutral(neutral(torch.softmax(neutral(x @ x.mT), -1)) @ x)


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_cascade_is_the_same(name: str, run: Callable[..., Any]) -> None:
    x = torch.randn(2, 3, 7, 8)
    run(lambda x: attention(x, lambda y: y), x)
    found = run(lambda x: attention(x, NEUTRAL[name]), x)
    torch.testing.assert_close(found, attention(x, lambda y: y), rtol=1e-5, atol=1e-5)
    plain, other = (report.cascades[0] for report in backend.reports())
    assert plain.status == other.status == "fused"
    assert _unnamed(other.cascade) == _unnamed(plain.cascade)


def _unnamed(cascade: str) -> str:
    """The last statement goes by the name of the last operator."""
    lines = cascade.strip().splitlines()
    last = lines[-1].removeprefix("output ")
    return re.sub(rf"\b{last}\b", "out", cascade)


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_logarithm_of_a_probability_folds(name: str) -> None:
    found = einfold.explain(lambda x: entropy(x, NEUTRAL[name]), torch.randn(3, 50))
    assert "function: fused, 3 -> 1 passes" in str(found)
