"""What down projections read is turned as the model runs, and no result of the model is another."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import einfold
from einfold.compiler import driver
from einfold.compiler.calibrate.observers.input_moments import InputMoments
from einfold.compiler.calibrate.snapshot import copied
from einfold.compiler.calibrate.stream import stream
from einfold.compiler.ir.ops import einfold_ops
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.quant.orthogonal import signed_factors, turned_by
from einfold.compiler.ir.verifier import verify
from einfold.compiler.passes.base import Note
from einfold.compiler.passes.weight_quant.rotate_down import RotateDown
from einfold.compiler.passes.weight_quant.rotate_residual import RotateResidual
from einfold.compiler.passes.weight_quant.rotate_values import RotateValues
from einfold.compiler.recipe import Recipe
from einfold.errors import RecipeError

from ..encoders import common
from ..programs import calls, program, run
from ..quick import rarely
from .test_rotate_residual import TOKENS, logits, model

PASSES = (RotateValues(), RotateResidual(), RotateDown())


@cache
def planned(name: str) -> Program:
    return driver.plan_cache(driver.wrap_model(model(name)), Recipe())


def rotated(name: str) -> tuple[Program, dict[str, list[Note]]]:
    plain = planned(name)
    found = copied(plain)
    found.output.meta["val"] = plain.output.meta["val"]
    notes = {step.name: step.run(found).notes for step in PASSES}
    verify(found)
    return found, notes


def applied(notes: list[Note]) -> int:
    return sum(note.action == "applied" for note in notes)


@pytest.mark.parametrize("width", [8, 96, 1536, 4864])
def test_signs_in_the_matrices_leave_them_orthogonal(width: int) -> None:
    matrices = signed_factors(width)
    assert len(matrices[0]) * len(matrices[1]) == width
    for matrix in matrices:
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64))
    alike = turned_by(torch.ones(1, width, dtype=torch.float64), *matrices)
    assert (
        float(alike.abs().max()) < 0.75 * width**0.5 or width == 8
    )  # all in one place without signs


@pytest.mark.parametrize(
    ("name", "values", "residual", "down"),
    [
        ("llama", 2, 1, 2),
        ("gemma3", 2, 0, 2),
        ("gpt2", 2, 0, 2),
        rarely("deepseek_v3", 0, 1, 2),
    ],
)
def test_the_logits_are_what_they_were(name: str, values: int, residual: int, down: int) -> None:
    """All places that a model has, one behind the other."""
    found, notes = rotated(name)
    assert [applied(notes[step.name]) for step in PASSES] == [values, residual, down]
    want, got = logits(planned(name)), logits(found)
    assert float((got - want).norm() / want.norm()) < 1e-5
    if name == "deepseek_v3":
        left = [note.what for each in notes.values() for note in each if note.action == "skipped"]
        assert sum("reads them too" in what for what in left) == 2
        assert "what experts' down projections read is within them" in left


def test_all_layers_read_the_same_two_matrices() -> None:
    plain = planned("llama")
    found = copied(plain)
    RotateDown().run(found)
    new = {name: found.weights[name].shape for name in found.weights if name.startswith("down.")}
    assert new == {"down.96.outer": (3, 3), "down.96.inner": (32, 32)}
    assert len(list(found.nodes(einfold_ops.mix_channels.default))) == 2


def test_what_a_text_shows_of_a_down_projection_is_turned() -> None:
    """Solvers see its inputs as the weight will: Q' H Q where H was."""
    plain = planned("llama")
    found = copied(plain)
    RotateDown().run(found)
    was, now = (
        {
            name: at["moment"].double()
            for name, at in stream(each, TOKENS, [InputMoments()]).items()
            if "down_proj" in name
        }
        for each in (plain, found)
    )
    assert len(was) == len(now) == 2
    for before, behind in zip(was.values(), now.values(), strict=True):
        half = turned_by(before, *signed_factors(96))
        torch.testing.assert_close(
            behind, turned_by(half.T, *signed_factors(96)), rtol=1e-3, atol=1e-5
        )


BODY = """
    weight @up : f32[24, 8]
    weight @w.weight : f32[8, 24]
    weight @u.weight : f32[8, 24]
    input %x "x" : f32[B, 8]
    read %up "up" : f32[24, 8]
    read %w "w.weight" : f32[8, 24]
    read %u "u.weight" : f32[8, 24]
    call %g = einfold.linear(%x, %up, none) : f32[B, 24]
    call %h = {activation} : f32[B, 24]
    call %y = einfold.linear(%h, %w, none) : f32[B, 8]
    call %z = einfold.linear({other}, {weight}, none) : f32[B, 8]
    call %s = aten.add.Tensor(%y, %z) : f32[B, 8]
    output "s" = %s
"""


def mlp(activation: str, other: str = "%h", weight: str = "%u") -> Program:
    return program(BODY.format(activation=activation, other=other, weight=weight))


def test_an_activation_is_turned_once_for_all_that_read_it() -> None:
    plain = mlp("aten.relu.default(%g)")
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    want = run(plain, x=x)["s"]
    result = RotateDown().run(plain)
    assert applied(result.notes) == 2
    assert sum("mix_channels" in call for call in calls(plain)) == 1
    torch.testing.assert_close(run(plain, x=x)["s"], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("plain", "reason"),
    [
        (mlp("aten.gelu.default(%g)", weight="%w"), "are read elsewhere too"),
        (mlp("aten.tanh.default(%g)"), "no linear reads the activation of an MLP"),
        (
            program(
                BODY.format(activation="aten.relu.default(%g)", other="%h", weight="%u").replace(
                    "24", "20"
                )
            ),
            "20 channels have no power of two",
        ),
        (
            program(
                BODY.format(activation="aten.relu.default(%g)", other="%h", weight="%u").replace(
                    "f32", "f16"
                )
            ),
            "computed in float16",
        ),
    ],
)
def test_inputs_that_cannot_be_turned_are_left_and_said(plain: Program, reason: str) -> None:
    before = calls(plain)
    result = RotateDown().run(plain)
    assert not result.changed and calls(plain) == before
    assert all(reason in note.what for note in result.notes) and result.notes


def test_an_encoder_reads_integers_that_are_turned(tmp_path: Path) -> None:
    """And has no values over a cache: asked for, they are refused."""
    found = common.build("bert")
    inputs = common.texts(2, 9)
    with torch.no_grad():
        want: dict[str, Any] = found(**inputs)
    recipe = {"weights": "int8:block=0,activations=int8,rotate=down", "target": "reference"}
    einfold.compile(found, tmp_path / "out", recipe=recipe, check=False)
    got = einfold.load(tmp_path / "out").run({k: v.numpy() for k, v in inputs.items()})
    mask: Tensor = inputs["attention_mask"]
    assert common.share(got["last_hidden_state"], want["last_hidden_state"], mask) < 0.1
    with pytest.raises(
        RecipeError, match=r"rotate_values was asked for .* no attention over a cache"
    ):
        einfold.compile(found, tmp_path / "no", recipe={"weights": "int8:rotate=values"})


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ("down+residual", "residual+down"),
        ("values+values", "values"),
        ("true", True),
        ("auto", "auto"),
    ],
)
def test_places_are_named_in_any_order(asked: str, kept: str | bool) -> None:
    recipe = Recipe.build({"weights": f"int4:rotate={asked}"})
    assert recipe.weights.rotate == kept
    assert ("rotate_down" in recipe.asked()) == ("down" in asked)


def test_a_place_that_is_none_is_refused() -> None:
    with pytest.raises(
        RecipeError, match="residual, values, down; it has none that is called 'heads'"
    ):
        Recipe.build({"weights": "int4:rotate=values+heads"})
