"""A finished artifact that computes something else than its reference is not kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from einfold.errors import EinfoldError
from einfold.evaluate import self_check as module
from einfold.evaluate.self_check import self_check


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
