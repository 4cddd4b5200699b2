"""A finished artifact that computes something else than its reference is not kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import einfold
from einfold.errors import EinfoldError
from einfold.evaluate import self_check as module
from einfold.evaluate.self_check import self_check

from .. import models


@pytest.mark.parametrize(
    ("weights", "portable", "arithmetic"),
    [
        ("fp32", False, "float32"),
        ("int4", True, "float32"),  # standard operators: whatever accuracy level the recipe has
        ("int4", False, "int8 products (accuracy level 4)"),
    ],
)
def test_a_difference_is_refused_where_float32_explains_none(
    weights: str,
    portable: bool,
    arithmetic: str,
    artifact: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = artifact("llama", weights, portable)
    assert self_check(folder)["arithmetic"] == arithmetic

    class Wrong(module.ReferenceRunner):
        def step(self, *arguments: Any) -> Any:
            return super().step(*arguments) + 0.01

    monkeypatch.setattr(module, "ReferenceRunner", Wrong)
    if arithmetic == "float32":
        with pytest.raises(EinfoldError, match="differs from the reference"):
            self_check(folder)
    else:
        assert self_check(folder)["largest difference of logits"] > 0.009


@pytest.mark.parametrize("method", ["streaming_llm:sinks=1,recent=4,slack=2", "h2o:tokens=6"])
def test_tokens_that_leave_within_the_check_are_no_fault(method: str, tmp_path: Path) -> None:
    """The reference lets go of the same tokens, however few a cache keeps, in steps that fit its slack."""
    model = models.build("llama")
    for prefill in ("exact", "streaming"):
        out = tmp_path / prefill
        report = einfold.compile(model, out, prune=f"{method},prefill={prefill}")
        assert report.check["tokens"] == 16
