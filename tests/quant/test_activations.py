"""Activations in 8 bits: what is rounded, what products then are, and what is refused."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

import einfold
from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.ops import einfold_ops
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.quant.scheme import Scheme
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.quant.schemes.qserve import QServe
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.passes.weight_quant.round_activations import RoundActivations
from einfold.compiler.recipe import Recipe
from einfold.compiler.solve.gptq import GPTQ
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.errors import RecipeError

from .. import models
from ..codegen.onnx.test_onnx import build
from ..programs import calls, program
from ..quick import rarely
from .common import BODY

#: Two linears that read the same, one of another input, and a head.
LINEARS = """
    weight @e.weight : f32[600, 40]
    weight @a.weight : f32[24, 40]
    weight @b.weight : f32[300, 40]
    weight @c.weight : f32[40, 300]
    weight @c.bias : f32[40]
    input %ids "input_ids" : i64[B, S]
    read %e "e.weight" : f32[600, 40]
    read %wa "a.weight" : f32[24, 40]
    read %wb "b.weight" : f32[300, 40]
    read %wc "c.weight" : f32[40, 300]
    read %cc "c.bias" : f32[40]
    call %h = einfold.embedding(%ids, %e) : f32[B, S, 40]
    call %a = einfold.linear(%h, %wa, none) : f32[B, S, 24]
    call %b = einfold.linear(%h, %wb, none) : f32[B, S, 300]
    call %c = einfold.linear(%b, %wc, %cc) : f32[B, S, 40]
    call %l = einfold.linear(%c, %e, none) : f32[B, S, 600]
    output "logits" = %l
    output "a" = %a
    output "c" = %c
"""
IDS = {"input_ids": torch.tensor([[1, 299, 7], [0, 3, 3]])}
INTEGERS: list[Scheme] = [
    Grouped(8, 0),
    Grouped(4, 0, scales="f16"),
    Grouped(3, 0),
    QServe(),
    QServe(16),
]


def rounded(scheme: Scheme, text: str = LINEARS) -> Program:
    found = program(text)
    QuantizeWeights(scheme).run(found)
    RoundActivations().run(found)
    return found


def test_rows_are_integers_times_a_scale() -> None:
    x = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(1))
    x[1, 2], x[0, 0] = 0.0, torch.linspace(-1, 1, 50) * 127  # steps of 1 and no rounding error
    found = einfold_ops.round_to_int8(x)
    scales = x.abs().amax(-1, keepdim=True) / 127
    assert bool((found[1, 2] == 0).all())
    assert bool(((found - x).abs() <= scales / 2 * (1 + 1e-5)).all())
    assert torch.equal(found[0, 0], x[0, 0].round())
    codes = found / scales.clamp(min=1e-9)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    half = einfold_ops.round_to_int8(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), found, rtol=0, atol=float(scales.max()) * 1.1)
    with pytest.raises(ValueError, match="rows of floats"):
        einfold_ops.round_to_int8(torch.zeros(2, 3, dtype=torch.int64, device="meta"))


def test_inputs_are_rounded_once_and_the_head_reads_its_own() -> None:
    found = program(LINEARS)
    QuantizeWeights(Grouped(8, 0)).run(found)
    result = RoundActivations().run(found)
    names = [call.split("(")[0].removeprefix("einfold.") for call in calls(found)]
    linear = "stored_linear"
    assert names == [
        "stored_embedding",
        "round_to_int8",
        linear,
        linear,
        "round_to_int8",
        linear,
        linear,
    ]
    notes = {note.where: (note.action, note.what) for note in result.notes}
    assert notes["a.packed"] == ("applied", "inputs in 8 bits, a scale a row")
    assert notes["e.packed"] == ("skipped", "the head reads its inputs as they are")


def test_other_weights_and_experts_are_told_of() -> None:
    found = program(BODY)
    QuantizeWeights(Grouped(4, 32), Grouped(8, 0)).run(found)
    reasons = {note.what for note in RoundActivations().run(found).notes}
    assert "its weight is no integers with one scale a row" in reasons
    found = program(BODY)
    QuantizeWeights(QServe(16)).run(found)
    notes = {note.where: note.what for note in RoundActivations().run(found).notes}
    assert "experts read their inputs as they are" in notes.values()


@pytest.mark.parametrize("flavour", ["ort", "portable"])
@pytest.mark.parametrize("scheme", INTEGERS, ids=str)
def test_onnxruntime_multiplies_integers(scheme: Scheme, flavour: str, tmp_path: Path) -> None:
    """To the last bits what the reference says: sums of integers are exact on both sides."""
    found = rounded(scheme)
    want = Interpreter(found).run(IDS)
    session, names = build(found, flavour, tmp_path)
    fed = {name: value.numpy() for name, value in IDS.items()}
    for name, value in zip(names, session.run(None, fed), strict=True):
        size = float(want[name].abs().max())
        torch.testing.assert_close(torch.from_numpy(value), want[name], rtol=0, atol=2e-6 * size)
    nodes = onnx.load(str(tmp_path / "m.onnx"), load_external_data=False).graph.node
    assert [node.op_type for node in nodes].count("MatMulInteger") == 3
    assert [node.op_type for node in nodes].count("Round") == 2, (
        "rows that two read are rounded once"
    )


@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_what_multiplies_no_integers_reads_floats(flavour: str, tmp_path: Path) -> None:
    """The same to the bit as the reference, ties and rows of zeros too."""
    found = program("""
        input %x "x" : f32[N, 8]
        call %y = einfold.round_to_int8(%x) : f32[N, 8]
        output "y" = %y
    """)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
    x[0], x[1] = 0.0, torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, 3, -127])
    session, _ = build(found, flavour, tmp_path)
    (got,) = session.run(None, {"x": x.numpy()})
    assert torch.equal(torch.from_numpy(got), Interpreter(found).run({"x": x})["y"])
    assert got[1].tolist() == [127, 0, 2, 2, 0, -2, 3, -127]


def test_weights_in_progressive_groups_stay_in_int8() -> None:
    """Whatever a solver does: here ranges are narrowed, and errors handed on to columns that are full."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(32, 256, generator=generator)
    weight[:, 7] *= 30
    moment = torch.randn(256, 256, generator=generator)
    moment = moment @ moment.T / 256
    for solver, statistics in ((RoundToNearest(), {}), (GPTQ(), {"moment": moment})):
        scheme = QServe()
        pieces = solver.solve(weight, scheme, statistics).pieces
        units = pieces["units"][:, None]
        integers = scheme.dequantize(pieces, 256) / units
        torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-3)
        assert float(integers.abs().max()) < 127.5
        assert int(pieces["scales"].max()) <= 16


def test_a_second_level_of_integers_costs_little() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    errors = {
        scheme: RoundToNearest().solve(weight, scheme, {}).error
        for scheme in (QServe(), Grouped(4, 128, False))
    }
    mine, floats = errors.values()
    assert mine is not None and floats is not None and floats < mine < 1.1 * floats
    assert QServe().nbytes((64, 512)) == 64 * (256 + 4 + 2 + 4)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (
            "int8:activations=int8",
            "those of int8 are stored in 8 bits, block 32, symmetric; use int8",
        ),
        ("int8:block=0,symmetric=false,activations=int8", "one scale a row"),
        ("fp16:activations=int8", "products of integers"),
        ("fp32:activations=int8", "those of fp32 are as they come"),
        ("nf4:activations=int8", "or qserve"),
        ("int8:block=0,activations=int4", "weights.activations: Input should be 'f32' or 'int8'"),
    ],
)
def test_what_is_no_product_of_integers_is_refused(weights: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.build({"weights": weights})


def test_a_recipe_rounds_activations_where_it_is_asked_to() -> None:
    def passes(text: str) -> list[str]:
        return [step.name for step in Recipe.build({"weights": text}).weight_passes()]

    assert passes("int8:block=0") == ["quantize_weights"]
    both = ["quantize_weights", "round_activations"]
    assert passes("int8:block=0,activations=int8") == both
    assert passes("gptq:format=qserve") == both, "W4A8 is what it is for"
    assert passes("qserve:activations=f32") == ["quantize_weights"]
    assert Recipe.build({"weights": "qserve"}).weights.activations == "int8"


@pytest.mark.parametrize(
    ("weights", "widened"),
    [("qserve", []), ("qserve:activations=f32", ["4 bits, block 128, under"])],
)
def test_weights_are_said_to_be_widened_where_they_are(weights: str, widened: list[str]) -> None:
    """In standard operators integers are multiplied as they are, and floats by float32 weights."""
    remarks = Recipe.build({"weights": weights, "onnx": {"portable": True}}).remarks()
    assert len(remarks) == len(widened)
    assert all(part in said for part, said in zip(widened, remarks, strict=True))


@pytest.mark.parametrize("storage", ["f32", rarely("int8"), rarely("int4")])
def test_what_a_step_chooses_its_attention_by_is_rounded_too(storage: str, tmp_path: Path) -> None:
    """A branch of the graph gives the attention of one token behind long contexts: of fractions, as the
    artifact's check must see."""
    model, out = models.build("llama", max_position_embeddings=8192), tmp_path / "out"
    recipe = {"cache": {"storage": storage}}
    einfold.compile(model, out, weights="int8:block=0,activations=int8", recipe=recipe)
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    assert storage == "int4" or any(node.op_type == "If" for node in graph.node)
    assert einfold.load(out).generate([1, 2, 3], max_new_tokens=4, ignore_eos=True).tokens
