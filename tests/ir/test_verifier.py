from __future__ import annotations

import pytest
import torch

from einfold.compiler.ir.program import Editor
from einfold.compiler.ir.verifier import verify
from einfold.errors import IRError

from ..programs import program

ATTENTION = """
    input %x "x" : f32[B, S, 4, 16]
    call %a = einfold.attention(%x, %x, %x, none, 0, 0.25, 0, 0.0) : f32[B, S, 4, 16]
    call %b = einfold.attention(%a, %x, %x, none, 1, 0.25, 0, 0.0) : f32[B, S, 4, 16]
    output "y" = %b
"""


def test_a_good_program_passes() -> None:
    verify(program(ATTENTION), deep=True)


def test_two_attentions_of_one_layer() -> None:
    with pytest.raises(IRError, match="layer 1 calls attention more than once"):
        verify(program(ATTENTION.replace("none, 0, 0.25", "none, 1, 0.25")))


def test_use_before_definition() -> None:
    found = program(ATTENTION)
    first, second = list(found.graph.nodes)[1:3]
    first.update_arg(0, second)
    with pytest.raises(IRError, match="before it is defined"):
        verify(found)


def test_a_type_that_lies() -> None:
    found = program(ATTENTION)
    node = list(found.graph.nodes)[1]
    node.meta["val"] = found.shapes.tensor(["B", "S", 4, 8], torch.float32)
    verify(found)
    with pytest.raises(IRError, match="carries the type"):
        verify(found, deep=True)


def test_unknown_operator() -> None:
    found = program(ATTENTION)
    node = list(found.graph.nodes)[1]
    node.target = print
    with pytest.raises(IRError, match="not an operator"):
        verify(found)


def test_shapes_that_do_not_fit_are_named() -> None:
    found = program(ATTENTION)
    node = list(found.graph.nodes)[1]
    with (
        Editor(found).before(found.output) as editor,
        pytest.raises(IRError, match=r"aten.mm.default.*does not accept"),
    ):
        editor.call(torch.ops.aten.mm.default, node, node)
