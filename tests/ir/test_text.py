"""The textual form prints and parses back to the same graph, and refuses what is not it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from einfold.compiler.driver import open_model, trace
from einfold.compiler.ir.parser import parse
from einfold.compiler.ir.printer import print_program
from einfold.compiler.ir.verifier import verify
from einfold.compiler.recipe import Recipe
from einfold.errors import IRError

from .. import models
from ..programs import HEADER, program
from ..quick import quick

BODY = """
    weight @w : f32[8, 4]
    input %x "x" : f32[B, 4]
    read %w "w" : f32[8, 4]
    call %y = einfold.linear(%x, %w, none) : f32[B, 8]
    call %z = aten.mul.Tensor(%y, 0.5) : f32[B, 8]
    output "z" = %z
"""


@pytest.mark.parametrize(
    ("name", "weights"),
    quick(
        [
            *((name, "fp32") for name in models.CONFIGS),
            ("gemma3", "fp16"),
            ("mixtral", "int4"),
            ("gpt2", "int8"),
        ],
        ("gpt_oss", "fp32"),
        ("gpt2", "int8"),
    ),
)
def test_round_trip(name: str, weights: str, model_folder: Callable[[str], Path]) -> None:
    recipe = Recipe.build({"weights": {"format": weights}})
    found, _ = trace(open_model(model_folder(name)), recipe)
    verify(found, deep=True)
    text = print_program(found)
    again = parse(text)
    verify(again, deep=True)
    assert print_program(again) == text
    assert again.layout == found.layout
    assert again.model == found.model


def test_every_kind_of_argument_reads_back() -> None:
    text = HEADER + (
        'input %x "an \\"odd\\" name" : f32[B, S, 6]\n'
        "call %a = aten.split_with_sizes.default(%x, [2, 4], -1) : (f32[B, S, 2], f32[B, S, 4])\n"
        "call %b = builtin.getitem(%a, 1) : f32[B, S, 4]\n"
        "call %c = aten._to_copy.default(%b, dtype=f16) : f16[B, S, 4]\n"
        "call %d = aten.clamp.default(%c, none, inf) : f16[B, S, 4]\n"
        "call %e = aten.mul.Tensor(%d, -1e-06) : f16[B, S, 4]\n"
        'call %f = aten.gelu.default(%e, approximate="tanh") : f16[B, S, 4]\n'
        'output "out" = %f\n'
    )
    assert print_program(parse(text)) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("einfold.ir 1", "einfold.ir 9"), "not a program"),
        (("einfold.linear", "einfold.linea"), "not an operator"),
        (("aten.mul.Tensor", "os.system"), "not an operator"),
        (("aten.mul.Tensor", "builtin.eval"), "not an operator"),
        (("%w, none", "%v, none"), "before it is defined"),
        ((": f32[B, 8]\n    output", ": f32[B, 9]\n    output"), "its arguments give"),
        (("f32[8, 4]\n    call", "f32[8, 5]\n    call"), "line"),
        (('output "z" = %z', ""), "no output"),
        (("%x, %w, none", "%x, __import__('os'), none"), "cannot read"),
        (("call %z", "call %y"), "defined twice"),
        (("0.5", "[0.5"), "line"),
        (("call %z", "jump %z"), "expected a statement"),
    ],
)
def test_refusals_name_the_line(change: tuple[str, str], message: str) -> None:
    lines = HEADER + BODY.strip().replace("    ", "")
    old, new = (part.replace("    ", "") for part in change)
    assert old in lines
    with pytest.raises(IRError, match=message):
        parse(lines.replace(old, new) + "\n")


def test_weights_are_loaded_by_name() -> None:
    found = program(BODY)
    assert found.weights["w"].load().shape == (8, 4)
    with pytest.raises(IRError, match="no data"):
        parse(HEADER + BODY.strip().replace("    ", "") + "\n").weights["w"].load()
