"""What a recipe means by weights of which little is said."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

import einfold
from einfold.api import resolve_recipe
from einfold.compiler.passes.weight_methods import BEST, explaining
from einfold.compiler.recipe import Recipe
from einfold.recipe_text import recipe_text
from tests import models
from tests.encoders import common

SOLVED = {
    "format": "int4",
    "block": 128,
    "symmetric": False,
    "head": "same",
    "rotate": "auto",
}
ROUNDED = {"format": "int4", "block": 32, "symmetric": True, "head": "int8", "solver": None}


def told(recipe: Recipe, reads: bool) -> dict[str, Any]:
    return recipe.settled(reads).weights.model_dump()


@pytest.mark.parametrize("given", ["int4", "int4:solver=best", {"format": "int4"}])
def test_int4_alone_is_what_is_best_for_the_model(given: Any) -> None:
    recipe = Recipe.build({"weights": given})
    assert recipe.weights.solver == BEST
    found = told(recipe, True)
    assert found.items() >= SOLVED.items() and found["solver"]["method"] == "decoupleq"
    assert told(recipe, False).items() >= ROUNDED.items()


@pytest.mark.parametrize("target", ["onnx", "triton"])
def test_targets_without_zero_points_get_none(target: str) -> None:
    portable = {"onnx": {"portable": True}} if target == "onnx" else {}
    found = told(Recipe.build({"weights": "int4", "target": target, **portable}), True)
    assert found.items() >= (SOLVED | {"symmetric": target == "onnx"}).items()


@pytest.mark.parametrize(
    ("given", "solver"),
    [
        ("int4:block=128", None),
        ("int4:head=int8", None),
        ("int4:solver=round_to_nearest", "round_to_nearest"),
        ("gptq:bits=4", "gptq"),
        ("int8", None),
        ("int3", None),
        ("fp32", None),
    ],
)
def test_what_is_said_is_what_is_done(given: str, solver: str | None) -> None:
    recipe = Recipe.build({"weights": given})
    for reads in (True, False):
        assert recipe.settled(reads) is recipe
    named = recipe.weights.solver
    assert (named["method"] if isinstance(named, dict) else named) == solver


@pytest.mark.parametrize(
    ("width", "block"), [(0, 128), (896, 128), (576, 64), (960, 64), (288, 32), (100, 128)]
)
def test_blocks_fill_a_row_where_they_can(width: int, block: int) -> None:
    settled = Recipe.build({"weights": "int4"}).settled(True, width).weights
    assert settled.options["block"] == block
    given = Recipe.build({"weights": "int4:solver=best,block=128"}).settled(True, width).weights
    assert given.options["block"] == 128


def test_best_beside_other_options_leaves_them() -> None:
    found = told(Recipe.build({"weights": "int3:solver=best,block=64"}), True)
    assert found["solver"]["method"] == "decoupleq"
    assert (found["format"], found["block"], found["head"]) == ("int3", 64, "int8")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"format": "nf4"}, "nf4"),
        ({"format": "int4", "bpw": None}, "int4"),
        ({"format": "int4", "bpw": 4.6}, "int4"),
        ({"format": "int4", "bpw": 7.9}, "int6"),
        ({"format": "int8", "bpw": 3.99}, "int3"),
        ({"format": "int4", "bpw": 1.5}, "int2"),
        ({"format": "int4", "bpw": 20.0}, "int8"),
    ],
)
def test_a_mix_is_judged_by_integers_of_its_average(given: dict[str, Any], name: str) -> None:
    assert explaining(given).name == name


@pytest.mark.parametrize(
    ("format_", "solver"), [("nf4", "decoupleq"), ("ternary", "gptq"), ("olive", None)]
)
def test_best_is_the_best_that_fills_a_format(format_: str, solver: str | None) -> None:
    found = told(Recipe.build({"weights": f"{format_}:solver=best"}), True)["solver"]
    assert (found and found["method"]) == solver


def test_it_is_written_and_read_again() -> None:
    recipe = Recipe.build({"weights": "int4"})
    text = recipe_text(recipe)
    for again in (Recipe.build(tomllib.loads(text)), resolve_recipe(recipe)):
        assert again.weights == recipe.weights and told(again, True).items() >= SOLVED.items()


@pytest.mark.slow
def test_a_language_model_is_solved_and_an_encoder_rounded(tmp_path: Path) -> None:
    folder = models.save("llama", tmp_path / "model")
    made = einfold.compile(
        folder, tmp_path / "a", weights="int4", recipe={"calibration": {"tokens": 256}}
    )
    assert made.manifest.recipe["weights"]["solver"]["method"] == "decoupleq"
    assert "256 tokens of a text that the model wrote" in made.calibration
    encoder = common.save("bert", tmp_path / "encoder")
    made = einfold.compile(encoder, tmp_path / "b", weights="int4")
    assert made.manifest.recipe["weights"]["solver"] is None


@pytest.mark.slow
def test_another_seed_is_another_text(tmp_path: Path) -> None:
    folder = models.save("llama", tmp_path / "model")
    made = {}
    for seed in (0, 1):
        calibration = {"tokens": 256, "seed": seed}
        out = tmp_path / str(seed)
        einfold.compile(folder, out, weights="gptq:bits=2", recipe={"calibration": calibration})
        made[seed] = (out / "weights.safetensors").read_bytes()
    assert made[0] != made[1]


@pytest.mark.parametrize("weights", ["spqr", "kquant:bits=4", "trellis:bits=2", "int4:block=64"])
def test_a_head_in_8_bits_stays_so_whatever_bits_the_format_has(weights: str) -> None:
    (step,) = Recipe.build({"weights": weights}).weights.passes()
    assert step.head.bits == 8  # type: ignore[attr-defined, union-attr]
    assert step.head.block == (64 if "64" in weights else 32)  # type: ignore[attr-defined, union-attr]
