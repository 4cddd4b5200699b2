"""The residual stream is turned, and no result of the model is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

import einfold
from einfold.compiler import driver
from einfold.compiler.calibrate.snapshot import copied, text_inputs
from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.ops import einfold_ops
from einfold.compiler.ir.ops.channels import MixChannels
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.quant.orthogonal import factors, mixed, turned
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.stored import StoredWeight
from einfold.compiler.ir.verifier import verify
from einfold.compiler.ir.weights import Weight
from einfold.compiler.passes.base import PassResult
from einfold.compiler.passes.weight_quant.rotate_residual import RotateResidual
from einfold.compiler.recipe import Recipe
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.errors import ModelError, RecipeError

from .. import models
from ..greedy import all_logits
from ..programs import calls, program
from ..quick import quick, rarely

TOKENS = torch.randint(models.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))


def model(name: str, **changes: Any) -> Any:
    """One whose norms have weights that are not 1."""
    found = models.build(name, **changes)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for label, parameter in found.named_parameters():
            if "norm" in label:
                parameter.uniform_(0.5, 2.0, generator=generator)
    return found


def planned(name: str, **changes: Any) -> Program:
    return driver.plan_cache(driver.wrap_model(model(name, **changes)), Recipe())


def logits(found: Program) -> Tensor:
    rows = torch.arange(TOKENS.numel())
    return Interpreter(found).run(text_inputs(TOKENS, rows))["logits"].double()


def rotated(plain: Program) -> tuple[Program, PassResult]:
    found = copied(plain)
    found.output.meta["val"] = plain.output.meta["val"]
    result = RotateResidual().run(found)
    verify(found)
    return found, result


@pytest.mark.parametrize("width", [8, 9, 12, 64, 576, 896, 1536, 2048, 4096])
def test_rows_of_any_length_are_turned_by_an_orthogonal_matrix(width: int) -> None:
    outer, inner = factors(width)
    assert len(outer) * len(inner) == width and len(inner) <= 64
    for matrix in (outer, inner):
        torch.testing.assert_close(matrix, matrix.T)
        torch.testing.assert_close(matrix @ matrix, torch.eye(len(matrix), dtype=torch.float64))
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(mixed(mixed(rows)), rows)
    alone = turned(torch.eye(width, dtype=torch.float64)[5])
    assert float(alone.abs().max()) <= 2 * float(alone.square().mean().sqrt())  # over all places


NAMES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "mixtral",
    "gpt_oss",
    "qwen2_moe",
    "qwen3_moe",
]


@pytest.mark.parametrize(
    ("name", "tied"),
    quick(
        [*((name, True) for name in NAMES), ("llama", False), ("mixtral", False)],
        ("qwen2", True),
        ("qwen3", True),
        ("mixtral", False),
    ),
)
def test_the_logits_are_what_they_were(name: str, tied: bool) -> None:
    plain = planned(name, tie_word_embeddings=tied)
    found, result = rotated(plain)
    assert result.changed
    (table,) = found.nodes(einfold_ops.embedding.default)
    assert (str(table.args[1].target) in plain.weights) == tied  # type: ignore[union-attr]
    want, got = logits(plain), logits(found)
    assert float((got - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_what_stands_out_in_a_channel_is_spread_over_all(name: str) -> None:
    """A writer whose rows of one channel are large: its numbers are alike once they are turned."""
    plain = planned(name)

    def peak(found: Program) -> float:
        first = next(
            each for each in found.weights if "o_proj" in each and found.weights[each].shape[1:]
        )
        weight = found.weights[first].load()
        return float(weight.abs().max() / weight.square().mean().sqrt())

    first = next(
        each for each in plain.weights if "o_proj" in each and plain.weights[each].shape[1:]
    )
    weight = plain.weights[first].load().clone()
    weight[7] *= 50
    plain.weights.restore({first: Weight.of(weight)})
    found, _ = rotated(plain)
    assert peak(plain) > 15 > 8 > peak(found)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt2", "otherwise than through an RMS norm or a linear"),
        rarely("opt", "otherwise than through an RMS norm or a linear"),
        rarely("gemma2", "writes it, whose result cannot be turned in a weight"),
        ("gemma3", "writes it, whose result cannot be turned in a weight"),
    ],
)
def test_a_stream_that_cannot_be_turned_stays_and_is_said(name: str, reason: str) -> None:
    plain = planned(name)
    found, result = rotated(plain)
    assert not result.changed and calls(found) == calls(plain)
    (note,) = result.notes
    assert note.where == "residual stream" and reason in note.what


def test_a_model_that_was_asked_for_it_in_vain_is_refused(tmp_path: Path) -> None:
    folder = models.save("gpt2", tmp_path / "model")
    recipe = {"weights": "int8:rotate=true", "target": "reference"}
    with pytest.raises(
        RecipeError, match=r"rotate_residual was asked for and found nothing to do.*RMS norm"
    ):
        einfold.compile(folder, tmp_path / "out", recipe=recipe, check=False)


@pytest.mark.parametrize("weights", ["fp32:rotate=true", "fp16:rotate=true"])
def test_what_is_not_rounded_to_levels_is_not_turned(weights: str) -> None:
    with pytest.raises(RecipeError, match=r"weights\.rotate spreads what stands out before"):
        Recipe.build({"weights": weights})


def test_what_is_best_is_turned_where_it_can_be() -> None:
    """And refused nowhere: only who asked for it is told that it was in vain."""
    best = Recipe.build({"weights": "int4"}).settled(True, 64)
    asked = Recipe.build({"weights": "decoupleq:bits=4,rotate=true"})
    for recipe, refuses in ((best, False), (asked, True)):
        assert any(isinstance(step, RotateResidual) for step in recipe.weight_passes())
        assert (RotateResidual.name in recipe.asked()) == refuses
    told = Recipe.build({"weights": "int4:solver=best,rotate=false"}).settled(True, 64)
    assert told.weights.rotate is False
    left = Recipe.build({"weights": "int4"}).settled(False, 64)
    assert not any(isinstance(step, RotateResidual) for step in left.weight_passes())


BODY = """
    weight @e : f32[11, 16]
    weight @g : f32[16]
    weight @w.weight : f32[16, 16]
    weight @o : f32[11, 16]
    input %ids "input_ids" : i64[B, S]
    read %e "e" : f32[11, 16]
    read %g "g" : f32[16]
    read %w "w.weight" : f32[16, 16]
    read %o "o" : f32[11, 16]
    call %h = einfold.embedding(%ids, %e) : f32[B, S, 16]
    call %n = einfold.rms_norm(%h, %g, 0.00001) : f32[B, S, 16]
    call %y = einfold.linear(%n, %w, none) : f32[B, S, 16]
    call %t = aten.add.Tensor(%h, %y) : f32[B, S, 16]
    call %l = einfold.linear({last}, %o, none) : f32[B, S, 11]
    output "logits" = %l
"""


def test_what_is_read_without_a_norm_is_turned_too() -> None:
    plain = program(BODY.format(last="%t"))
    found, result = rotated(plain)
    assert result.changed
    inputs = {"input_ids": TOKENS % 11}
    want, got = (Interpreter(each).run(inputs)["logits"] for each in (plain, found))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reader", ["aten.tanh.default(%t)", "aten.mul.Tensor(%t, %g)"])
def test_channels_that_are_not_alike_to_a_reader_are_left(reader: str) -> None:
    body = BODY.replace("    call %l =", f"    call %u = {reader} : f32[B, S, 16]\n    call %l =")
    plain = program(body.format(last="%u"))
    found, result = rotated(plain)
    assert not result.changed and "reads it otherwise" in result.notes[0].what
    assert calls(found) == calls(plain)


@pytest.mark.parametrize("name", ["w.weight", "e"])
def test_codes_that_a_checkpoint_brings_are_not_turned(name: str) -> None:
    plain = program(BODY.format(last="%t"))
    scheme, whole = Grouped(4, 16), plain.weights[name].load()
    codes = RoundToNearest().solve(whole, scheme, {}).pieces
    pieces = {label: Weight.of(piece) for label, piece in codes.items()}
    shape = tuple(whole.shape)
    plain.weights.restore({name: StoredWeight.holding(scheme, shape, pieces)})
    _, result = rotated(plain)
    assert not result.changed and "comes in codes, which turning would lose" in result.notes[0].what


@pytest.mark.parametrize("name", ["w.weight", "e", "g"])
def test_numbers_that_are_none_are_named_as_they_came(name: str) -> None:
    """Turned they would be in a whole row, of a weight whose name nobody knows."""
    damaged = program(BODY.format(last="%t")).weights[name].load().clone()
    damaged.view(-1)[3] = float("nan")
    found, _ = rotated(program(BODY.format(last="%t"), **{name: damaged}))
    told = f"the weight {name} has numbers that are infinite or none"
    with pytest.raises(ModelError, match=told):
        all(found.weights[each].load().numel() for each in found.weights if "turned" in each)


@pytest.mark.parametrize("target", ["reference", "onnx"])
def test_an_artifact_gives_what_the_model_gives(target: str, tmp_path: Path) -> None:
    found = model("llama", tie_word_embeddings=True)
    found.save_pretrained(tmp_path / "model")
    recipe = {"weights": "int8:block=16,rotate=true", "target": target}
    einfold.compile(tmp_path / "model", tmp_path / "out", recipe=recipe)
    loaded = einfold.load(tmp_path / "out", threads=1)
    tokens = TOKENS[:1]
    want = found(tokens).logits[0].detach().double()
    got = torch.from_numpy(all_logits(loaded, tokens[0].tolist())).double()
    assert float((got - want).norm() / want.norm()) < 0.05


class Mixing(torch.nn.Module):
    """Matrices that are not symmetric."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.outer, self.inner = (torch.randn(n, n, generator=generator) for n in (3, 8))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = einfold_ops.mix_channels(x, self.outer, self.inner)
        return found


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("lead", [(4,), (2, 3)])
def test_onnx_mixes_as_the_operator_does(
    lead: tuple[int, ...], portable: bool, tmp_path: Path
) -> None:
    x = torch.randn(*lead, 24)
    path = einfold.export_onnx(Mixing(), tmp_path / "m", (x,), portable=portable)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    (found,) = session.run(None, {given.name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), Mixing()(x), rtol=1e-5, atol=1e-5)


def test_matrices_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="mix no rows of 10 channels"):
        MixChannels(torch.zeros(2, 10), torch.eye(3), torch.eye(4)).shapes()


@pytest.mark.parametrize("portable", [False, True])
def test_a_step_that_nobody_asks_logits_of_is_run(portable: bool, tmp_path: Path) -> None:
    """As every part of a long prompt but the last: the head, and what turns its input back, have no rows."""
    found = models.build("llama", tie_word_embeddings=True, max_position_embeddings=700)
    found.save_pretrained(tmp_path / "model")
    recipe = {
        "weights": "int8:block=16,rotate=true",
        "target": "onnx",
        "onnx": {"portable": portable},
    }
    einfold.compile(tmp_path / "model", tmp_path / "out", recipe=recipe, check=False)
    loaded = einfold.load(tmp_path / "out", threads=1)
    tokens = TOKENS.flatten().repeat(13)[:600]
    want = found(tokens[None]).logits[0, 590:].detach().double()
    ((_, logits_SV),) = loaded.logits(tokens.tolist(), 590)
    got = torch.from_numpy(np.array(logits_SV)).double()
    assert got.shape == want.shape and float((got - want).norm() / want.norm()) < 0.05
