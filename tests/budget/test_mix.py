"""Mixed widths: what each weight is said to lose is what is lost, and widths follow from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from einfold.compiler.budget.mix import Mix
from einfold.compiler.budget.sensitivity import Sensitivity
from einfold.compiler.calibrate.snapshot import copied, text_inputs
from einfold.compiler.calibrate.statistics import Statistics
from einfold.compiler.calibrate.stream import stream
from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.weights import Weight
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.recipe import Recipe
from einfold.compiler.solve.gptq import GPTQ
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.errors import CalibrationError, RecipeError

from ..calibrate.common import TEXT
from ..programs import program
from ..solve.test_solving import TWO

SCHEME = Grouped(4, 16)
WIDTHS = (Grouped(2, 16), Grouped(4, 16), Grouped(8, 16))


def rounded(weight: Tensor, scheme: Grouped) -> Tensor:
    pieces = RoundToNearest().solve(weight, scheme, {}).pieces
    return scheme.dequantize(pieces, weight.shape[1])


def log_shares(found: Program) -> Tensor:
    rows = torch.arange(TEXT.numel())
    (logits,) = Interpreter(found).run(text_inputs(TEXT, rows)).values()
    return torch.log_softmax(logits.reshape(TEXT.numel(), -1), -1)


def test_what_a_weight_loses_is_what_the_model_loses_by_it_alone() -> None:
    found = program(TWO)
    seen = Sensitivity(dict.fromkeys(("w.weight", "u.weight"), (SCHEME, *WIDTHS)), TEXT, "text")
    told = stream(found, seen.sample(found)[0], [seen])  # type: ignore[index]
    (kl,) = (each["kl"] for each in told.values() if "kl" in each)
    original = log_shares(found)
    for place, name in enumerate(("w.weight", "u.weight")):
        trial = copied(found)
        weight = found.weights[name].load()
        trial.weights.restore({name: Weight.of(rounded(weight, SCHEME))})
        want = (original.exp() * (original - log_shares(trial))).sum(-1).mean()
        assert float(want) > 1e-4
        assert float(kl[place]) == pytest.approx(float(want), rel=1e-3)
        errors = told[name]["errors"]
        assert errors[0] == errors[2] and errors[1] > 4 * errors[2] > 16 * errors[3]


def statistics() -> Statistics:
    return Statistics(lambda: (TEXT, "a text"))


def bits(found: Program, *names: str) -> list[int]:
    """Of weights of 16 columns by how wide their codes lie."""
    return [8 * found.weights[f"{name}.packed"].shape[-1] // 16 for name in names]


@pytest.mark.parametrize("felt", ["w.weight", "u.weight"])
def test_the_weight_that_is_felt_gets_more_bits(felt: str) -> None:
    """The other one is met exactly in any width."""
    other = {"w.weight": "u.weight", "u.weight": "w.weight"}[felt]
    found = program(TWO, **{other: torch.eye(16)})
    found.statistics = statistics()
    step = QuantizeWeights(SCHEME, mix=Mix(7.1, (2, 4, 8)))
    result = step.run(found)
    stem, beside = felt.removesuffix(".weight"), other.removesuffix(".weight")
    assert bits(found, stem, beside) == [8, 2]
    assert bits(found, "o") == [4]  # the head is not part of it
    notes = [note.what for note in result.notes if note.where == "mix"]
    assert notes == ["7.1 bits a weight on average: 1 in 2 bits, 1 in 8 bits of 2"]
    assert step.options()["bpw"] == 7.1


@pytest.mark.parametrize("known", [True, False], ids=["measured", "without weights"])
@pytest.mark.parametrize("bpw", [4.0, 6.0, 8.0, 9.9, 32.0])
def test_bytes_stay_within_the_budget(bpw: float, known: bool) -> None:
    found = program(TWO)
    found.statistics = statistics() if known else None
    chosen = Mix(bpw, (8, 2, 4)).chosen(found, SCHEME, ())
    assert chosen.keys() == {"w.weight", "u.weight"}
    taken = sum(scheme.nbytes((16, 16)) for scheme in chosen.values())
    assert taken <= bpw * 2 * 256 / 8
    assert all(scheme == replace(SCHEME, bits=scheme.bits) for scheme in chosen.values())
    assert bpw < 32 or {scheme.bits for scheme in chosen.values()} == {8}


def test_a_weight_that_is_left_apart_has_no_width() -> None:
    assert Mix(6.0, (2, 8)).chosen(program(TWO), SCHEME, ("w.weight",)).keys() == {"u.weight"}


def test_where_nothing_is_mixed_it_is_said() -> None:
    found = program("""
    weight @o.weight : f32[24, 16]
    input %x "x" : f32[B, 16]
    read %o "o.weight" : f32[24, 16]
    call %l = einfold.linear(%x, %o, none) : f32[B, 24]
    output "logits" = %l
    """)
    result = QuantizeWeights(SCHEME, mix=Mix(6.0, (2, 8))).run(found)
    assert [note.action for note in result.notes if note.where == "mix"] == ["skipped"]


def test_solved_weights_have_the_widths_too() -> None:
    found = program(TWO)
    found.statistics = statistics()
    QuantizeWeights(SCHEME, solver=GPTQ(), mix=Mix(6.0, (2, 8))).run(found)
    (calibration,) = found.calibrations
    calibration.run(TEXT)
    assert sorted(bits(found, "w", "u")) in ([2, 2], [2, 8])
    for name in found.weights:
        assert bool(found.weights[name].load().isfinite().all())


def test_too_few_bits_are_said_with_the_least() -> None:
    with pytest.raises(
        RecipeError, match=r"bpw is 3.5 bits a weight, and 4.00 are the least.* 2\+4"
    ):
        Mix(3.5, (2, 4)).chosen(program(TWO), SCHEME, ())


def test_a_text_of_one_token_a_row_is_refused() -> None:
    found = program(TWO)
    found.statistics = Statistics(lambda: (TEXT[:, :1], "a text"))
    with pytest.raises(CalibrationError, match="rows of 1 tokens; a mix of widths needs 2"):
        Mix(6.0, (2, 8)).chosen(found, SCHEME, ())


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ("nf4:bpw=4", "chooses among integers of several widths, and nf4 is none"),
        ("fp16:bpw=4", "chooses among integers of several widths, and fp16 is none"),
        ("int4:bpw=4,widths=2+7", "widths are some of 2, 3, 4, 5, 6, 8 bits"),
        ("int4:bpw=4,widths=many", r"numbers joined by \+, as 2\+4\+8, found 'many'"),
        ("int4:bpw=0", "greater than 0"),
        (
            "int4:widths=2+8",
            "widths are what a mix chooses among; give the bits a weight too, as bpw=4.5",
        ),
        ("int4:bpw=few", "weights.bpw is a number of bits"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_read(weights: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        Recipe.build({"weights": weights})


def test_encoders_have_no_text_to_measure_on(tmp_path: Path) -> None:
    import einfold
    from tests.encoders import common

    with pytest.raises(RecipeError, match=r"a mix of widths \(bpw\) reads a text"):
        einfold.compile(
            common.save("bert", tmp_path / "m"), tmp_path / "out", recipe={"weights": "int4:bpw=5"}
        )


def test_a_recipe_knows_every_scheme_that_may_come_of_it() -> None:
    recipe: Any = Recipe.build({"weights": "gptq:bpw=4.5,block=64"})
    (step,) = recipe.weights.passes()
    assert [scheme.bits for scheme in step.schemes()] == [2, 4, 8, 8]
    assert recipe.reads_text == "the solver gptq"
    assert Recipe.build({"weights": "int4:bpw=5"}).reads_text == "a mix of widths (bpw)"
