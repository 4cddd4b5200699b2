"""The page of methods, and the settings at which they are compared with kvpress."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import einfold
from benchmarks import kvpress_peers, methods
from benchmarks.workers import kvpress_cache
from einfold.compiler.passes.cache_methods import FAMILIES
from einfold.compiler.recipe import Recipe
from einfold.evaluate.recall import KeyPlace, Window

NAMES = [(family, name) for family, known in FAMILIES.items() for name in known]


@pytest.mark.parametrize(("family", "name"), NAMES)
def test_every_method_stands_in_the_table(family: str, name: str) -> None:
    rows = [line for line in methods.PAGE.read_text().splitlines() if line.startswith("|")]
    (row,) = [line for line in rows if line.startswith(f"| `--{family} {name}` |")]
    assert len(row.split(" | ")) == len(methods._COLUMNS)
    facts = methods.tomllib.loads(methods.FACTS.read_text())[name]
    assert facts["family"] == family and all(facts[key] for key in ("paper", "stored", "bytes"))


def test_the_page_takes_its_figures_from_the_measurement() -> None:
    facts = methods.tomllib.loads(methods.FACTS.read_text())
    row = {
        "targets": ["onnx"],
        "held": 0.5,
        "held_at_questions": 0.25,
        "perplexity": 5.5,
        "reference_perplexity": 5.0,
        "kl": 0.0123,
        "recall": 0.25,
        "reference_recall": 0.9,
        "speed": 1.5,
    }
    figures = {
        "rows": {"streaming_llm": row},
        "read": {"model": "m", "tokens": 1234, "documents": 5, "keys": 6},
    }
    real = {
        "--prune streaming_llm": {
            "cache_bytes": {"4000": 25},
            "full_cache_bytes": {"4000": 100},
            "perplexity": 12.0,
            "reference_perplexity": 10.0,
            "kl": 0.5,
            "recall": {"1000": 0.2, "4000": 0.1},
            "reference_recall": {"1000": 0.8, "4000": 0.7},
        }
    }
    page = methods.page(facts, figures, real)
    toys = "| onnx | 0.50, 0.25 | +10.00% | 1.2e-02 | 0.250 (0.900) | 1.50 |"
    assert f"{toys} 0.25 | +20.00% | 5.0e-01 | 0.20 (0.80); 0.10 (0.70) |" in page
    assert "1,234 tokens" in page and "positions stay absolute" in page
    assert page.count("not measured yet") == len(facts) - 1


def test_shares_of_a_full_cache(text_artifact: Path, text_model: Path, tmp_path: Path) -> None:
    pieces = [Window(list(range(100)), (KeyPlace(3, 80, (90, 91)),)), Window(list(range(50)))]
    full = methods.shares(einfold.load(text_artifact), pieces)
    assert full == {"held": 1.0, "held_at_questions": 1.0}
    window = "streaming_llm:sinks=1,recent=20,slack=4"
    einfold.compile(text_model, tmp_path / "a", prune=window, check=False)
    pruned = methods.shares(einfold.load(tmp_path / "a"), pieces)
    assert pruned == {"held": 50 / 150, "held_at_questions": 25 / 92}


@pytest.mark.parametrize("budget", [256, 64])
def test_settings_are_recipes_that_keep_the_budget(budget: int) -> None:
    for name, cache in kvpress_peers.settings(budget).items():
        prune = Recipe.build({"cache": cache}).cache.prune
        assert prune is not None and prune["method"] == name
        kept = prune.get("tokens") or prune["sinks"] + prune["recent"]
        assert kept == budget
    for cache in kvpress_peers.packed().values():
        Recipe.build({"cache": cache, "target": "reference"})


def test_a_short_prompt_is_left_whole() -> None:
    assert kvpress_cache.press_of(lambda prompt, keep: (prompt, keep), 64, 64) is None
    assert kvpress_cache.press_of(lambda prompt, keep: (prompt, keep), 65, 64) == (65, 64)


def _results(name: str) -> Any:
    return json.loads((methods.ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def _measured() -> dict[str, list[dict[str, Any]]]:
    """Rows of the real model whose recall the docstring of a method tells."""
    kept, heads = _results("kept-tokens")["rows"], _results("head-ablation")["compiled"]
    real = methods.on_real_model()
    found = {
        "kvzip": [kept[share]["kvzip"] for share in ("50%", "25%", "12%")],
        "razor_attention": [heads["razor_attention, 25"]],
        "duo_attention": [heads[f"duo_attention, {count}"] for count in (43, 25)],
        "snapkv": [kept["50%"]["snapkv"]],
        "expected_attention": [kept[share]["expected_attention"] for share in ("50%", "25%")],
        "kivi": [real["--quant kivi:bits=4"], real["--quant kivi"]],
        "turboquant": [real["--quant turboquant"]],
        "gear": [real["--quant gear"]],
        "zipcache": [real["--quant zipcache"]],
        "mikv": [real["--quant mikv"]],
        "abq": [real["--quant abq"], real["--quant abq:bits=4,order=none"]],
        "mustafar": [
            real["--quant mustafar"],
            real["--quant mustafar:sparsity=0.7,dtype=i8"],
        ],
    }
    for name in ("kvzip", "razor_attention", "duo_attention", "snapkv", "expected_attention"):
        found[name].append(real[f"--prune {name}"])
    return found | {
        "streaming_llm": [real["--prune streaming_llm"]],
        "h2o": [real["--prune h2o"]],
        "ems": [real["--prune ems"]],
        "scissorhands": [real["--prune scissorhands"]],
        "d2o": [real["--prune d2o"]],
        "kvmerger": [real["--prune kvmerger"]],
        "kvcrush": [real["--prune kvcrush"]],
        "elastic_cache": [real["--prune elastic_cache"]],
        "locret": [real["--prune locret"]],
        "pyramid_kv": [real["--prune pyramid_kv"]],
        "zipvl": [real["--prune zipvl"]],
        "ada_kv": [real["--prune ada_kv"]],
        "cross_layer": [real["--share cross_layer"]],
        "minicache": [real["--share minicache"]],
        "cskv": [real["--share cskv"]],
        "matryoshka_kv": [real["--share matryoshka_kv"]],
        "quest": [real["--read quest"]],
        "shadowkv": [real["--read shadowkv"]],
    }


@pytest.mark.parametrize(("family", "name"), NAMES)
def test_what_a_method_says_was_measured_is_what_was(family: str, name: str) -> None:
    """Every pair of recalls in its docstring is that of a committed row, and each of these is told."""
    said = re.findall(r"(0\.\d\d) and (0\.\d\d)", FAMILIES[family][name].paragraph("Measured"))
    rows = _measured().get(name, [])
    found = [tuple(f"{row['recall'][label]:.2f}" for label in ("1000", "4000")) for row in rows]
    whole = _results("kept-tokens")["whole"]
    every = tuple(f"{whole[label]:.2f}" for label in ("1000", "4000"))
    assert set(said) == ({*found, every} if rows else set())
