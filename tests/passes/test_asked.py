"""A method that was asked for and finds nothing to do is refused, in a compile and in `cache_for` alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import einfold
from einfold.compiler.ir.manifest import Manifest
from einfold.errors import RecipeError

from .. import models
from ..quick import quick

WINDOW = "streaming_llm:sinks=2,recent=9,slack=5"

#: Model, options, the method that finds nothing, and why.
IDLE: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "llama",
        {"prune": "snapkv:tokens=64", "quant": "kivi:group=8,residual=32"},
        "kivi",
        "keep few tokens",
    ),
    (
        "llama",
        {"prune": "h2o:tokens=64", "quant": "gear:group=8,tokens=16,residual=32"},
        "gear",
        "keep few tokens",
    ),
    ("llama", {"prune": WINDOW, "quant": "mikv:group=8,residual=32"}, "mikv", "keep few tokens"),
    ("llama", {"prune": WINDOW, "quant": "zipcache:tokens=32"}, "zipcache", "keep few tokens"),
    ("llama", {"share": "cskv", "prune": "h2o:tokens=64"}, "h2o", "an earlier pass decided"),
    ("llama", {"share": "cskv", "cache": "int8"}, "static_int8", "stored by low_rank already"),
    ("llama", {"share": "cskv", "cache": "f16"}, "half_slots", "stored by low_rank already"),
    (
        "llama",
        {"quant": "kivi:group=8,residual=32", "cache": "f16"},
        "half_slots",
        "stored by kivi already",
    ),
    (
        "llama",
        {"prune": "razor_attention:induction=1,echo=0"},
        "razor_attention",
        "keep all",
    ),
    ("llama", {"share": "cross_layer:threshold=1"}, "cross_layer", "layer 0"),
    ("mistral", {"prune": WINDOW}, "streaming_llm", "has a sliding window of 16 tokens of its own"),
    ("mistral", {"quant": "kivi:group=8,residual=32"}, "kivi", "has a sliding window of 16 tokens"),
    ("gemma2", {"prune": "h2o:tokens=64"}, "h2o", "its logits are capped"),
    ("gpt_oss", {"prune": "snapkv:tokens=64"}, "snapkv", "has learned sinks"),
]


@pytest.mark.parametrize(
    ("name", "options", "method", "reason"),
    quick(IDLE, *(IDLE[at] for at in (0, 4, 8, 10, -1))),
    ids=[f"{name}-{method}-{'+'.join(options)}" for name, options, method, _ in IDLE],
)
def test_a_method_with_nothing_to_do_is_refused(
    name: str, options: dict[str, Any], method: str, reason: str, tmp_path: Path
) -> None:
    """By the pass manager, which both roads take; compiling goes on to it in the first cases and the last."""
    model, says = models.build(name), f"^{method} was asked for and found nothing .*{reason}"
    with pytest.raises(RecipeError, match=says):
        einfold.cache_for(model, **options)
    if (name, options, method, reason) in (IDLE[0], IDLE[1], IDLE[-1]):
        with pytest.raises(RecipeError, match=says):
            einfold.compile(model, tmp_path / "a", target="reference", **options)
        assert not (tmp_path / "a").exists()


def test_one_that_finds_a_part_goes_on(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """RazorAttention's retrieval heads are packed, its other heads are not; Gemma 2 keeps its windows."""
    options = {
        "prune": "razor_attention:induction=0.3,recent=9,slack=5",
        "quant": "kivi:group=8,residual=32",
    }
    einfold.compile(model_folder("llama"), tmp_path / "a", target="reference", **options)
    manifest = Manifest.read(tmp_path / "a")
    cache = "\n".join(manifest.cache)
    assert "storage=kivi" in cache and "policy=window" in cache
    assert manifest.recipe["cache"]["quant"]["method"] == "kivi"
    einfold.cache_for(models.build("gemma2"), prune=WINDOW).release()
