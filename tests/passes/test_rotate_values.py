"""The values of heads are turned, in the weights alone, and no result of the model is another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import einfold
from einfold.compiler.analysis.head_rows import head_rows
from einfold.compiler.calibrate.snapshot import copied
from einfold.compiler.ir.program import Program, attention_nodes, call_arguments
from einfold.compiler.ir.quant.orthogonal import turned
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.stored import StoredWeight
from einfold.compiler.ir.verifier import verify
from einfold.compiler.ir.weights import Weight
from einfold.compiler.passes.base import PassResult
from einfold.compiler.passes.weight_quant.rotate_values import RotateValues
from einfold.compiler.recipe import Recipe
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.errors import RecipeError

from .. import models
from ..greedy import all_logits
from ..programs import calls, program, run
from .test_rotate_residual import TOKENS

BODY = """
    weight @qkv.weight : f32[{rows}, 16]
    weight @qkv.bias : f32[{rows}]
    weight @o.weight : f32[16, {flat}]
    input %ids "input_ids" : i64[B, S]
    input %x "x" : f32[B, S, 16]
    read %w "qkv.weight" : f32[{rows}, 16]
    read %b "qkv.bias" : f32[{rows}]
    read %ow "o.weight" : f32[16, {flat}]
    call %n = aten.sym_size.int(%x, 0) : sym(B)
    call %s = aten.sym_size.int(%x, 1) : sym(S)
    call %y = einfold.linear(%x, %w, %b) : f32[B, S, {rows}]
    call %q0 = aten.slice.Tensor(%y, -1, 0, 32) : f32[B, S, 32]
    call %k0 = aten.slice.Tensor(%y, -1, 32, 48) : f32[B, S, 16]
    call %v0 = aten.slice.Tensor(%y, -1, 48, {rows}) : f32[B, S, {values}]
    call %q = aten.reshape.default(%q0, [%n, %s, 4, 8]) : f32[B, S, 4, 8]
    call %k = aten.reshape.default(%k0, [%n, %s, 2, 8]) : f32[B, S, 2, 8]
    call %v = aten.reshape.default(%v0, [%n, %s, 2, {size}]) : f32[B, S, 2, {size}]
    {before}
    call %a = einfold.attention(%q, %k, {v}, none, 3, 0.25, 0, 0.0) : f32[B, S, 4, {size}]
    {behind}
    call %f = aten.reshape.default({a}, [%n, %s, {flat}]) : f32[B, S, {flat}]
    call %o = einfold.linear(%f, %ow, none) : f32[B, S, 16]
    output "o" = %o
    output "m" = {more}
"""


def rotated(plain: Program) -> tuple[Program, PassResult]:
    found = copied(plain)
    found.output.meta["val"] = plain.output.meta["val"]
    result = RotateValues().run(found)
    verify(found)
    return found, result


def layer(
    before: str = "",
    behind: str = "",
    v: str = "%v",
    a: str = "%a",
    more: str = "%q",
    size: int = 8,
) -> Program:
    sizes = {"size": size, "values": 2 * size, "rows": 48 + 2 * size, "flat": 4 * size}
    return program(BODY.format(before=before, behind=behind, v=v, a=a, more=more, **sizes))


def test_the_rows_that_make_values_are_turned_and_no_others() -> None:
    """With a bias, in a linear that makes queries and keys too, and two heads of values for four."""
    plain = layer()
    found, result = rotated(plain)
    assert result.changed and calls(found) == [
        call.replace("%qkv", "%qkv.turned").replace("%o.w", "%o.turned.w") for call in calls(plain)
    ]
    (attention,) = attention_nodes(found)
    inputs = {"input_ids": TOKENS % 11, "x": torch.randn(2, 24, 16)}
    for got, want in zip(*(run(each, **inputs).values() for each in (found, plain)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    was, now = plain.weights["qkv.weight"].load(), found.weights["qkv.turned.weight"].load()
    assert torch.equal(was[:48], now[:48])
    values = head_rows(found, call_arguments(attention)["v_BSKD"])
    assert values.rows_HD.tolist() == torch.arange(48, 64).reshape(2, 8).tolist()
    torch.testing.assert_close(now[48:56], turned(was[48:56].T).T)
    assert found.weights.nbytes == plain.weights.nbytes


@pytest.mark.parametrize(
    ("plain", "reason"),
    [
        (
            layer("call %u = aten.mul.Tensor(%v, 2.0) : f32[B, S, 2, 8]", v="%u"),
            "normed or scaled behind their projection",
        ),
        (
            layer("call %u = aten.tanh.default(%v) : f32[B, S, 2, 8]", v="%u"),
            "%u stands between projection and attention",
        ),
        (
            layer(
                behind="call %c = einfold.attention(%q, %k, %v, none, 4, 0.25, 0, 0.0) : f32[B, S, 4, 8]",
                more="%c",
            ),
            "%c reads them too",
        ),
        (layer(more="%y"), "%output reads them too"),
        (
            layer(behind="call %g = aten.mul.Tensor(%a, %q) : f32[B, S, 4, 8]", a="%g"),
            "%g stands between attention and its output projection",
        ),
    ],
)
def test_values_that_something_else_reads_or_changes_are_left(plain: Program, reason: str) -> None:
    found, result = rotated(plain)
    assert calls(found) == calls(plain)
    assert not result.changed and all(
        note.what.startswith("values stay as they are: ") for note in result.notes
    )
    assert reason in result.notes[0].what


@pytest.mark.parametrize("name", ["qkv.weight", "o.weight"])
def test_codes_of_a_checkpoint_are_left(name: str) -> None:
    plain = layer()
    scheme, whole = Grouped(4, 16), plain.weights[name].load()
    codes = RoundToNearest().solve(whole, scheme, {}).pieces
    pieces = {label: Weight.of(piece) for label, piece in codes.items()}
    plain.weights.restore({name: StoredWeight.holding(scheme, tuple(whole.shape), pieces)})
    _, result = rotated(plain)
    assert not result.changed and "comes in codes" in result.notes[0].what


def test_heads_without_a_power_of_two_are_left() -> None:
    plain = layer(size=12)
    _, result = rotated(plain)
    assert "12 channels have no power of two" in result.notes[0].what


def test_a_cache_in_few_bits_holds_turned_values(tmp_path: Path) -> None:
    """Scales of channels are of what is cached: what stood out in one channel of values is in all of them."""
    model = models.build("qwen2")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.v_proj.weight[3] *= 10
    model.save_pretrained(tmp_path / "model")
    for target in ("reference", "onnx"):
        recipe = {
            "weights": "int8:block=16,rotate=residual+values+down",
            "target": target,
            "cache": {"storage": "int8"},
        }
        report = einfold.compile(tmp_path / "model", tmp_path / target, recipe=recipe)
        names = [record.name for record in report.passes]
        assert (
            names.index("rotate_values") < names.index("static_int8") < names.index("rotate_down")
        )
        loaded = einfold.load(tmp_path / target, threads=1)
        with torch.no_grad():
            want = model(TOKENS[:1]).logits[0].double()
        got = torch.from_numpy(all_logits(loaded, TOKENS[0].tolist())).double()
        assert float((got - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize(("asked", "left"), [("both", "keys"), ("values", "none")])
def test_values_are_turned_once(asked: str, left: str) -> None:
    recipe = {"weights": "int4:rotate=values", "target": "reference"}
    with pytest.raises(RecipeError, match=rf"cache\.quant kivi .* take rotate={left} there"):
        Recipe.build(recipe | {"cache": {"quant": f"kivi:rotate={asked}"}})
    Recipe.build(recipe | {"cache": {"quant": f"kivi:rotate={left}"}})
