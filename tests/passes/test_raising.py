from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from einfold.compiler.frontend.modules import capture_module
from einfold.compiler.ir.ops import einfold_ops
from einfold.compiler.ir.parser import parse
from einfold.compiler.ir.printer import print_program
from einfold.compiler.ir.weights import Weight
from einfold.compiler.passes.cleanup.fold_constants import FoldConstants
from einfold.compiler.passes.raising.raise_activations import RaiseActivations
from einfold.compiler.passes.raising.raise_linears import RaiseLinears
from einfold.compiler.passes.raising.raise_norms import RaiseNorms
from einfold.compiler.passes.raising.raise_rotary import RaiseRotary

from ..programs import calls, program, run

RMS = """
    weight @w : f32[8]
    input %x "x" : f32[B, 8]
    read %w "w" : f32[8]
    call %a = aten.pow.Tensor_Scalar(%x, 2) : f32[B, 8]
    call %b = aten.mean.dim(%a, [-1], true) : f32[B, 1]
    call %c = aten.add.Tensor(%b, 1e-05) : f32[B, 1]
    call %d = aten.rsqrt.default(%c) : f32[B, 1]
    call %e = aten.mul.Tensor(%x, %d) : f32[B, 8]
    call %f = aten.mul.Tensor(%w, %e) : f32[B, 8]
    output "y" = %f
"""


def test_rms_norm() -> None:
    found = program(RMS)
    x = torch.randn(3, 8)
    want = run(found, x=x)["y"]
    RaiseNorms().run(found)
    assert calls(found) == ["einfold.rms_norm(%x, %w, 1e-05)"]
    torch.testing.assert_close(run(found, x=x)["y"], want)


def test_rms_norm_by_power_and_square() -> None:
    body = RMS.replace("aten.rsqrt.default(%c)", "aten.pow.Tensor_Scalar(%c, -0.5)")
    body = body.replace("aten.pow.Tensor_Scalar(%x, 2)", "aten.mul.Tensor(%x, %x)")
    found = program(body)
    RaiseNorms().run(found)
    assert calls(found) == ["einfold.rms_norm(%x, %w, 1e-05)"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[-1], true", "[0], true"),
        ("(%x, 2)", "(%x, 3)"),
        ("aten.mul.Tensor(%x, %d)", "aten.mul.Tensor(%a, %d)"),
    ],
    ids=["other axis", "cube", "other numerator"],
)
def test_what_is_no_rms_norm_is_left_and_said(old: str, new: str) -> None:
    body = RMS.replace(old, new)
    if "[0]" in new:
        body = body.replace("f32[B, 1]", "f32[1, 8]")
    found = program(body)
    before = calls(found)
    result = RaiseNorms().run(found)
    assert calls(found) == before
    assert [note.action for note in result.notes] == ["skipped"]


class Cohere(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * ((x - mean) * torch.rsqrt(variance + 1e-5))


def test_layer_norm_spelled_out() -> None:
    module, x = Cohere(), torch.randn(3, 8)
    found = capture_module(module, (x,)).program
    RaiseNorms().run(found)
    assert [call.split("(")[0] for call in calls(found)] == ["einfold.layer_norm"]
    torch.testing.assert_close(run(found, x=x)["output_0"], module(x))


class Conv1D(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 5))
        self.bias = torch.nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, 8), self.weight).view(2, 3, 5)


def test_addmm_becomes_a_linear_over_all_axes() -> None:
    module, x = Conv1D(), torch.randn(2, 3, 8)
    found = capture_module(module, (x,)).program
    RaiseLinears().run(found)
    assert any(call.startswith("einfold.linear(%x") for call in calls(found))
    torch.testing.assert_close(run(found, x=x)["output_0"], module(x))


def test_a_product_of_two_inputs_is_no_linear() -> None:
    found = program("""
        input %x "x" : f32[B, 8]
        input %y "y" : f32[8, 4]
        call %z = aten.mm.default(%x, %y) : f32[B, 4]
        output "z" = %z
    """)
    result = RaiseLinears().run(found)
    assert not result.changed
    assert result.notes[0].what == "matrix product by a computed matrix"


class Gelu(torch.nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        inner = 0.7978845608028654 * (x + 0.044715 * x**3)
        return 0.5 * x * (1.0 + torch.tanh(inner)) * y


def test_gelu_by_hand_and_its_gate() -> None:
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    found = capture_module(Gelu(), (x, y)).program
    RaiseActivations().run(found)
    assert calls(found) == ['einfold.gated_activation(%x, %y, "gelu_tanh")']
    torch.testing.assert_close(run(found, x=x, y=y)["output_0"], Gelu()(x, y))


def test_an_activation_without_a_gate_stays() -> None:
    found = program("""
        input %x "x" : f32[B, 8]
        input %s "s" : f32[B, 1]
        call %a = aten.silu.default(%x) : f32[B, 8]
        call %y = aten.mul.Tensor(%a, %s) : f32[B, 8]
        output "y" = %y
    """)
    assert not RaiseActivations().run(found).changed


# Rotary embedding in the spellings of several models; every one is found by what it computes.

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = torch.cat((cos, cos), -1)[:, :, None], torch.cat((sin, sin), -1)[:, :, None]
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = x.split(x.shape[-1] // 2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, :, None], sin[:, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat((halves(x[..., :8], cos[..., :4], sin[..., :4]), x[..., 8:]), -1)


def heads_second(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((sin, sin), -1)[:, None]
    turned = torch.roll(x, 8, -1) * torch.cat((-torch.ones(8), torch.ones(8)))
    return (x * cos + turned * sin).transpose(1, 2)


def no_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = torch.cat((cos, cos), -1)[:, :, None], torch.cat((sin, sin), -1)[:, :, None]
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((second, first), -1) * sin  # a sign is wrong


def attention_model(spelling: Spelling) -> torch.nn.Module:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(11, 64)
            self.q, self.k = torch.nn.Linear(64, 64), torch.nn.Linear(64, 32)
            self.register_buffer("frequencies", 1.0 / 100 ** (torch.arange(0, 16, 2) / 16))

        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            hidden = self.table(input_ids)
            angles = position_ids[:, :, None].float() * self.frequencies
            cos, sin = angles.cos() * 1.3, angles.sin() * 1.3  # with YaRN's factor
            batch, length = input_ids.shape
            q = self.q(hidden).view(batch, length, 4, 16)
            k = self.k(hidden).view(batch, length, 2, 16)
            q, k = spelling(q, cos, sin), spelling(k, cos, sin)
            return einfold_ops.attention(q, k, k, None, 0, 0.25, 0, 0.0)

    torch.manual_seed(0)
    return Model()


def captured(module: torch.nn.Module) -> tuple[object, Tensor, Tensor]:
    ids, positions = (
        torch.randint(0, 11, (2, 6)),
        torch.stack((torch.arange(6), torch.arange(40, 46))),
    )
    dims = {0: torch.export.Dim("B"), 1: torch.export.Dim("S")}
    found = capture_module(module, (ids, positions), (dims, dims)).program
    text = print_program(found).replace("vocabulary=0 context=0", "vocabulary=11 context=64")
    again = parse(text, lambda name, declared: Weight.of(found.weights[name].load()))
    return again, ids, positions


@pytest.mark.parametrize(
    ("spelling", "width", "pairing"),
    [
        (halves, 8, "false"),
        (parts, 8, "false"),
        (interleaved, 8, "true"),
        (partial, 4, "false"),
        (heads_second, 8, "false"),
    ],
)
def test_rotary_in_any_spelling(spelling: Spelling, width: int, pairing: str) -> None:
    module = attention_model(spelling)
    found, ids, positions = captured(module)
    FoldConstants().run(found)  # type: ignore[arg-type]
    RaiseLinears().run(found)  # type: ignore[arg-type]
    result = RaiseRotary().run(found)  # type: ignore[arg-type]
    assert [note.where for note in result.notes] == ["layer 0 query", "layer 0 key"]
    rotary = [call for call in calls(found) if call.startswith("einfold.rotary")]  # type: ignore[arg-type]
    assert len(rotary) == 2
    assert all(call.endswith(f"{pairing})") for call in rotary)
    assert found.weights["rotary.0.cos"].shape == (64, width)  # type: ignore[attr-defined]
    got = run(found, input_ids=ids, position_ids=positions)["output_0"]  # type: ignore[arg-type]
    torch.testing.assert_close(got, module(ids, positions), rtol=1e-5, atol=1e-6)


def test_a_map_that_is_no_rotation_is_refused_with_its_error() -> None:
    found, _, _ = captured(attention_model(no_rotation))
    result = RaiseRotary().run(found)  # type: ignore[arg-type]
    assert {note.action for note in result.notes} == {"skipped"}
    assert "no rotation by position" in result.notes[0].what
