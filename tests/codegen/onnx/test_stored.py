"""Weights in any scheme on onnxruntime: kernels and what they give, what is said, what accounted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from einfold.compiler.codegen.onnx.kernels import WIDE, runtime_bits
from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.quant.scheme import Scheme, read_scheme
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.recipe import Recipe

from ...programs import program
from ...quant.common import BODY, INPUTS
from ...quick import rarely
from .test_onnx import FLAVOURS, build

WIDTH = """
    weight @w.weight : f32[24, {width}]
    weight @b : f32[24]
    input %x "x" : f32[B, S, {width}]
    read %w "w.weight" : f32[24, {width}]
    read %b "b" : f32[24]
    call %y = einfold.linear(%x, %w, %b) : f32[B, S, 24]
    output "y" = %y
"""


def linear(scheme: str | Scheme, width: int = 576) -> Program:
    found = program(WIDTH.format(width=width))
    QuantizeWeights(read_scheme(scheme) if isinstance(scheme, str) else scheme).run(found)
    return found


def kinds(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(folder / "m.onnx")).graph.node)


# Each way from a scheme to MatMulNBits, with how many products it takes; 576 is no multiple of 128 or 512.
KERNELS = [
    ("grouped(bits=3,block=128)", 1),
    ("grouped(bits=3,block=16,symmetric=0)", 1),
    ("grouped(bits=5,block=32,symmetric=0,scales=q8)", 2),
    ("grouped(bits=5,block=16)", 2),
    ("grouped(bits=6,block=0)", 2),
    ("grouped(bits=6,block=512,scales=f16)", 2),
    ("grouped(bits=6,block=128,symmetric=0)", 2),
    ("grouped(bits=2,block=16,symmetric=0,scales=f16)", 1),
    ("grouped(bits=4,block=128,scales=f16)", 1),
    ("grouped(bits=8,block=0)", 1),
    ("ternary(block=0)", 1),
    ("ternary(block=128)", 1),
    ("mxfp4", 1),
    ("nvfp4", 1),
    ("nf4(block=128)", 1),
    ("fp4(block=0)", 1),
    ("fp8(block=0)", 1),
    ("fp6(block=64)", 1),
    ("fp6(mantissa=2)", 1),
    ("kquant(bits=2)", 1),
    ("kquant(bits=3)", 1),
    ("kquant(bits=4)", 1),
    ("kquant(bits=5)", 2),
    ("kquant(bits=6)", 2),
]


@pytest.mark.parametrize(("text", "products"), KERNELS, ids=[text for text, _ in KERNELS])
def test_codes_go_through_integer_kernels(text: str, products: int, tmp_path: Path) -> None:
    """With one row and with several, where activations are rounded to int8: off by a percent or two of the
    largest number, as int4 is; and to float32's accuracy where a kernel is exact."""
    found = linear(text)
    x = torch.randn(2, 3, 576, generator=torch.Generator().manual_seed(0))
    for inputs in (x, x[:1, :1]):
        want = Interpreter(found).run({"x": inputs})["y"]
        session, _ = build(found, "ort", tmp_path, accuracy=4)
        (got,) = session.run(None, {"x": inputs.numpy()})
        off = float((torch.from_numpy(got) - want).abs().max() / want.abs().max())
        assert off < 0.02
    has = kinds(tmp_path)
    minimums = text in ("kquant(bits=2)", "kquant(bits=4)", "kquant(bits=5)")
    assert has["MatMulNBits"] == products and has["MatMul"] == 2 * minimums
    assert not has.keys() & {"Gemm", "FusedMatMul"}
    if runtime_bits(read_scheme(text), True, "ort") != WIDE:
        session, _ = build(found, "ort", tmp_path, accuracy=0)
        (got,) = session.run(None, {"x": x.numpy()})
        want = Interpreter(found).run({"x": x})["y"]
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    "text",
    [
        "grouped(bits=3)",
        "nvfp4",
        "nf4",
        "grouped(bits=4,scales=f16)",
        "kquant",
        rarely("planes"),  # onnxruntime folds each plane by itself
    ],
)
def test_experts_are_read_one_by_one(flavour: str, text: str, tmp_path: Path) -> None:
    """Where a kernel reads the scheme no stack is widened."""
    found = program(BODY)
    QuantizeWeights(read_scheme(text)).run(found)
    want = Interpreter(found).run(INPUTS)["y"]
    session, names = build(found, flavour, tmp_path)
    taken = {node.name for node in session.get_inputs()}
    feeds = {name: value.numpy() for name, value in INPUTS.items() if name in taken}
    got = dict(zip(names, session.run(None, feeds), strict=True))["y"]
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-4)
    wide = flavour == "portable" or runtime_bits(read_scheme(text), True, "ort") == WIDE
    assert (kinds(tmp_path)["Gemm"] > 0) == wide


def test_weights_without_a_kernel_are_told_of() -> None:
    def said(weights: dict[str, Any], **onnx: Any) -> list[str]:
        return Recipe.build({"weights": weights, "onnx": onnx}).remarks()

    assert said({"format": "int4"}) == said({"format": "nf4"}) == said({"format": "fp32"}) == []
    (text,) = said({"format": "nf4"}, accuracy_level=0)
    assert text.startswith("onnxruntime has no kernel for weights in nf4, block 64: they are small")
    assert "3 times what it takes with int4" in text
    (text,) = said({"format": "int3", "head": "same"}, portable=True)
    assert "3 bits, block 32, symmetric" in text
    (text,) = said({"format": "int4", "block": 0, "symmetric": False, "head": "int8"})[:1]
    assert "4 bits, a scale a row, asymmetric" in text


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("grouped(bits=3)", 4),
        ("grouped(bits=6)", 6),
        ("grouped(bits=5)", 6),
        ("grouped(bits=5,block=16)", 8),
        ("grouped(bits=2,block=16,scales=f16)", 4),
        ("ternary", 2),
        ("mxfp4", 8),
        ("fp8", 8),
    ],
)
def test_what_is_held_is_accounted(text: str, bits: int) -> None:
    """Codes and float32 scales as the kernel reads them, and a fifth."""
    made = Recipe.build({}).made_for
    found = linear(text)
    block = getattr(read_scheme(text), "block", 0) or 128
    want = 1.2 * 24 * 576 * (bits / 8 + 4 / min(128, block))
    assert made.held(found).packed == int(want)
    exact = Recipe.build({"onnx": {"accuracy_level": 0}}).made_for.held(found).packed
    wide = runtime_bits(read_scheme(text), True, "ort") == WIDE
    assert exact == (4 * 24 * 576 if wide else int(want))
