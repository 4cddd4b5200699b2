"""The methods for the KV cache, as the command line and the API take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import einfold
from einfold.compiler.passes.cache_methods import FAMILIES
from einfold.errors import RecipeError

from ..quick import rarely
from .test_bad_input import refused
from .test_cli import as_json
from .test_cli import einfold as einfold_cli

WINDOW = "streaming_llm:recent=20,sinks=2, slack=6"
TABLE: dict[str, Any] = {"method": "streaming_llm", "recent": 20, "sinks": 2, "slack": 6}
RESOLVED = TABLE | {"prefill": "exact"}


def recipe_of(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())["recipe"]["cache"]


def test_every_verb_takes_a_method(text_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    made = as_json("compile", text_model, "-o", out, "--prune", WINDOW, "--no-check")
    assert made["manifest"]["recipe"]["cache"]["prune"] == RESOLVED
    assert recipe_of(out)["prune"] == RESOLVED
    step = next(
        row for row in as_json("passes", "--prune", WINDOW) if row["name"] == "streaming_llm"
    )
    assert step["options"] == {key: RESOLVED[key] for key in RESOLVED if key != "method"}
    assert "prune streaming_llm" in einfold_cli("inspect", out)

    full = as_json("estimate", text_model, "--context", "200")
    pruned = as_json("estimate", text_model, "--context", "200", "--prune", WINDOW)
    per_token = full["cache"] // 200
    assert full["cache"] == full["cache_peak"] == 200 * per_token
    assert pruned["cache"] == (2 + 20 + 6) * per_token
    assert pruned["cache_peak"] > full["cache"]  # the whole prompt, and the first layer compressed
    assert pruned["total"] == pruned["weights"] + pruned["cache_peak"] + pruned["activations"]


@pytest.mark.slow
def test_an_estimate_is_for_the_context_that_a_compile_is_for(
    text_model: Path, tmp_path: Path
) -> None:
    """A window that is a share of the context, tables of so many positions, and what is refused."""
    method = "razor_attention:slack=8,sinks=2"
    made = einfold.compile(text_model, tmp_path / "a", context=100, prune=method, check=False)
    told = einfold.estimate(text_model, context=100, prune=method, budget=10**9)
    (window, *_) = made.manifest.layout().clocks().values()
    assert window.newest == 20
    assert told.cache == made.manifest.layout().bytes(1, 100)
    assert told.weights == made.manifest.weight_bytes
    assert told.largest_context == told.context == 100
    with pytest.raises(RecipeError, match="the context has 28: nothing would be pruned"):
        einfold.estimate(text_model, context=28, prune=WINDOW)


def test_the_api_takes_the_same(text_model: Path, tmp_path: Path) -> None:
    for method in (WINDOW, TABLE):
        einfold.compile(text_model, tmp_path / "a", prune=method, check=False, force=True)
        assert recipe_of(tmp_path / "a")["prune"] == RESOLVED
    undone = {"cache": {"prune": TABLE}}
    einfold.compile(text_model, tmp_path / "b", recipe=undone, prune="none", check=False)
    assert recipe_of(tmp_path / "b")["prune"] is None
    assert einfold.estimate(text_model, prune=WINDOW).cache < einfold.estimate(text_model).cache


@pytest.mark.parametrize("method", ["ada_kv:by=h2o", rarely("kvzip:by=h2o")])
def test_budgets_by_head_are_a_share_of_the_context(
    text_model: Path, tmp_path: Path, method: str
) -> None:
    """A quarter where nothing is said; the recipe that is kept says what was asked for."""
    quarter, half = (
        einfold.estimate(text_model, context=256, prune=f"{method},slack=8{share}").cache
        for share in ("", ",share=0.5")
    )
    whole = einfold.estimate(text_model, context=256).cache
    assert 0.25 * whole < quarter < 0.35 * whole and 0.5 * whole < half < 0.6 * whole
    einfold.compile(text_model, tmp_path / "a", prune=f"{method},slack=8", context=256, check=False)
    assert recipe_of(tmp_path / "a")["prune"]["tokens"] is None
    assert einfold.load(tmp_path / "a").generate([3, 4, 5], max_new_tokens=2).tokens


def test_the_streaming_recipe_is_constant_in_the_context(text_model: Path) -> None:
    found = einfold.estimate(
        text_model, recipe={"cache": {"prune": TABLE | {"prefill": "streaming"}}}
    )
    assert found.cache == found.cache_peak
    ready = einfold.api.find_recipe("streaming")
    assert einfold.compiler.recipe.Recipe.read(ready).cache.prune is not None


def test_packed_caches_are_estimated_for_the_targets_that_read_them(text_model: Path) -> None:
    method = ("--quant", "kivi:group=16,residual=16,slack=8")
    refused("estimate", text_model, *method, code=7, says="compile for the target triton")
    found = as_json("estimate", text_model, *method, "--target", "reference")
    assert found["cache"] < as_json("estimate", text_model)["cache"]
    names = [step["name"] for step in as_json("passes", *method, "--target", "reference")]
    assert "kivi" in names


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = as_json("methods")
    listed = {(row["family"], row["name"]) for row in rows}
    assert listed == {(family, name) for family, known in FAMILIES.items() for name in known}
    assert all(len(row["what"]) > 20 for row in rows)
    text = einfold_cli("methods")
    assert "--prune streaming_llm" in text
    (begin,) = [row for row in rows if "the one to begin with" in row["measured"]]
    assert begin["name"] == "kvzip" and begin["measured"] in text
    assert all(row["measured"].startswith("Measured on ") for row in rows)


@pytest.mark.parametrize(
    ("family", "written", "says"),
    [
        ("--prune", "snip", "cache.prune.method is one of"),
        ("--prune", "streaming_llm:recent", "written NAME:key=value"),
        ("--prune", "streaming_llm:recent=4,recent=5", "each key once"),
        ("--prune", "streaming_llm:", "written NAME:key=value"),
        ("--prune", "streaming_llm:recent=many", "cache.prune.recent"),
        ("--prune", "streaming_llm:heads=3", "unknown key 'heads'; streaming_llm takes sinks"),
        ("--quant", "streaming_llm", "cache.quant.method is one of"),
        ("--share", "", "cache.share.method is one of"),
    ],
)
def test_methods_that_are_none(text_model: Path, family: str, written: str, says: str) -> None:
    refused("estimate", text_model, family, written, code=7, says=says)
    refused("passes", family, written, code=7, says=says)


def test_an_estimate_refuses_a_probe_as_a_compile_does(text_model: Path) -> None:
    """Heads are found by a compile alone, but what it would say of the probe is known before."""
    short = "razor_attention:probe=9,recent=20,slack=8"
    refused("estimate", text_model, "--prune", short, code=10, says="a probe of 9 in a context of")
    none = short + ",induction=0,echo=0"  # no head to find, so no probe is needed
    assert as_json("estimate", text_model, "--prune", none)["cache"]


def test_formats_and_solvers_are_listed_with_their_options() -> None:
    text = einfold_cli("methods", "weights")
    assert "--weights int4, 5.000 bits a weight" in text and "--weights gptq" in text
    rows = json.loads(einfold_cli("methods", "weights", "--json"))
    found = {(row["family"], row["name"]): row for row in rows}
    assert found["format", "int4"]["options"]["block"] == 32
    assert found["format", "int3"]["bits"] == 4.0
    assert found["solver", "gptq"]["options"]["damping"] == 0.01
