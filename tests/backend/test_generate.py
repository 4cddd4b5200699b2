"""Hugging Face's generate() through the backend: the tokens of eager, every attention fused.

Most of it runs the rewritten graphs without a compiler for the rest, which is quick; `-m slow` has the same
through Inductor.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from einfold import backend

from .. import models
from ..greedy import check_tokens
from .conftest import QUICK

PROMPT, ROWS = 5, 2
CACHES = ("dynamic", "static")


def generate(model: Any, ids: torch.Tensor, new: int, cache: str) -> list[list[int]]:
    out = model.generate(
        ids,
        max_new_tokens=new,
        do_sample=False,
        cache_implementation=None if cache == "dynamic" else cache,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def compare(name: str, cache: str, new: int, options: dict[str, Any]) -> list[backend.GraphReport]:
    """The reports on the graphs, once the tokens are those of eager and all attention was fused."""
    model = models.build(name)
    torch.manual_seed(1)
    ids = torch.randint(3, models.VOCABULARY, (ROWS, PROMPT))
    expected = generate(model, ids, new, cache)
    model.compile(backend="einfold", options=options)
    found = generate(model, ids, new, cache)
    reports = backend.reports()
    assert reports, "the backend was never called"
    layers = model.config.num_hidden_layers
    for report in reports:
        assert report.fused == len(report.cascades) == layers, str(report)
    original = models.build(name)
    for row in range(ROWS):
        check_tokens(original, ids[row].tolist(), expected[row], found[row])
    return reports


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", models.CONFIGS)
def test_same_tokens_as_eager(name: str, cache: str) -> None:
    reports = compare(name, cache, 8, QUICK)
    assert all(c.passes_after == 1 for report in reports for c in report.cascades)


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", models.CONFIGS)
def test_same_tokens_as_eager_through_inductor(name: str, cache: str) -> None:
    compare(name, cache, 8, {"measure": "never"})


@pytest.mark.parametrize("cache", CACHES)
def test_at_most_two_recompilations_in_64_tokens(cache: str) -> None:
    assert len(compare("llama", cache, 64, QUICK)) <= 3


def test_past_the_window() -> None:
    """A full window is a graph of its own in transformers' static cache, and fused like the others."""
    assert len(compare("gemma2", "static", models.WINDOW + 4, QUICK)) <= 3


def test_through_inductor() -> None:
    """One model end to end, with what is left compiled."""
    reports = compare("gpt_oss", "static", 4, {"measure": "never"})
    assert {c.lowering for report in reports for c in report.cascades} == {"sdpa"}
