"""A finished artifact that computes something else than its reference is not kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import einfold
from einfold.compiler.codegen.reference.target import Reference
from einfold.errors import EinfoldError
from einfold.evaluate import self_check as module
from einfold.evaluate.self_check import self_check
from einfold.runtime.cache import Cache

from .. import models
from ..quick import rarely


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
    found = self_check(folder)
    assert found["arithmetic"] == arithmetic
    assert found["compressed cache"] == "none: every token stays in it"

    class Wrong(module.ReferenceRunner):
        def step(self, *arguments: Any) -> Any:
            return super().step(*arguments) + 0.01

    monkeypatch.setattr(module, "ReferenceRunner", Wrong)
    if arithmetic == "float32":
        with pytest.raises(EinfoldError, match="differs from the reference"):
            self_check(folder)
    else:
        assert self_check(folder)["largest difference of logits"] > 0.009


@pytest.mark.parametrize(
    ("target", "storage", "tokens", "said"),
    [
        ("onnx", "int8", 6, "float32, tokens that are read chosen by rounded scores"),
        rarely("onnx", "int8", 512, "float32"),  # everything is read here
        rarely("onnx", "f32", 6, "float32"),
        rarely("reference", "int8", 6, "float32"),  # it scores by queries as they are
    ],
)
def test_a_choice_among_codes_that_is_nearly_as_good_is_no_fault(
    target: str, storage: str, tokens: int, said: str, tmp_path: Path
) -> None:
    """With random weights pages score alike, and what rounds queries may choose others than the reference."""
    read = {"method": "quest", "page": 2, "tokens": tokens, "share": 0.25, "skip_layers": 0}
    recipe = {"target": target, "cache": {"storage": storage, "read": read}}
    found = einfold.compile(models.build("llama"), tmp_path / "out", recipe=recipe).check
    assert found["arithmetic"] == said
    beyond = found["largest difference of logits"] > module._TOLERANCE * found["largest logit"]
    assert beyond == (said != "float32")


@pytest.mark.parametrize(
    "method", ["streaming_llm:sinks=1,recent=4,slack=2", rarely("h2o:tokens=6")]
)
def test_tokens_that_leave_within_the_check_are_no_fault(method: str, tmp_path: Path) -> None:
    """The reference lets go of the same tokens, however few a cache keeps, in steps that fit its slack."""
    model = models.build("llama")
    for prefill in ("exact", "streaming"):
        out = tmp_path / prefill
        report = einfold.compile(model, out, prune=f"{method},prefill={prefill}")
        assert report.check["tokens"] == 16
        assert "read behind a prompt of" in report.check["compressed cache"]


def test_a_fault_that_shows_when_tokens_have_left_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows and packed tokens that the first few tokens do not fill, and what is too long to be read."""
    cache = {
        "prune": {"method": "razor_attention", "recent": 40, "slack": 8, "induction": 0.5},
        "quant": {"method": "kivi", "group": 8, "residual": 16, "slack": 8},
    }
    out, recipe = tmp_path / "out", {"target": "reference", "cache": cache}
    einfold.compile(models.build("llama"), out, recipe=recipe, check=False)
    found = self_check(out)["compressed cache"]
    # 4 sinks, 40 recent, 8 of slack and the compensation token; packed are 16 + 8 + 7 and one more
    assert found.startswith("read behind a prompt of 54 tokens: full kivi(residual=16")
    assert "window(sinks=4,recent=40" in found and "not checked" not in found

    class Wrong(module.ReferenceRunner):
        def step(self, cache: Cache, *arguments: Any) -> Any:
            left = any(packed.any() for packed in cache.packed.values())
            return super().step(cache, *arguments) + 0.01 * left

    monkeypatch.setattr(Reference, "runner", lambda self, artifact, *_, **__: Wrong(artifact))
    with pytest.raises(EinfoldError, match="differs from the reference"):
        self_check(out)
    parameters = einfold.load(out).artifact.manifest.model.parameters
    monkeypatch.setattr(module, "_WORK", 40 * parameters)
    with pytest.raises(EinfoldError, match="differs from the reference"):
        self_check(out)
    monkeypatch.setattr(module, "_WORK", 20 * parameters)
    assert self_check(out)["compressed cache"].startswith("not checked, for that takes a longer")


def test_of_what_stays_each_token_chooses_by_pages_as_they_are_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one step of several, the first would choose by statistics that the later ones are in."""
    sizes: list[int] = []

    class Counted(module.ReferenceRunner):
        def step(self, cache: Cache, ids: Any, *arguments: Any) -> Any:
            sizes.append(ids.shape[1])
            return super().step(cache, ids, *arguments)

    monkeypatch.setattr(module, "ReferenceRunner", Counted)
    cache = {
        "prune": {"method": "snapkv", "tokens": 40, "observe": 8, "slack": 24},
        "read": {"method": "quest", "page": 8, "share": 0.0, "tokens": 24, "skip_layers": 0},
    }
    recipe = {"target": "onnx", "cache": cache}
    found = einfold.compile(models.build("llama"), tmp_path / "out", recipe=recipe).check
    assert found["compressed cache"].startswith("read behind a prompt of 65 tokens: voted(")
    assert sizes[-module._STEPS :] == [1] * module._STEPS
    assert found["largest difference of logits"] < 1e-4
