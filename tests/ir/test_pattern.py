from __future__ import annotations

import torch

from einfold.compiler.ir.pattern import Call, Either, Node, Number, match
from einfold.compiler.ir.program import Program

from ..programs import program

aten = torch.ops.aten


def graph() -> Program:
    return program("""
        input %x "x" : f32[B, 4]
        input %y "y" : f32[B, 4]
        call %a = aten.mul.Tensor(%x, 2.0) : f32[B, 4]
        call %b = aten.add.Tensor(%y, %a) : f32[B, 4]
        output "b" = %b
    """)


def last(found: Program) -> torch.fx.Node:
    return list(found.graph.nodes)[-2]


def test_addition_matches_in_either_order_and_binds() -> None:
    pattern = Call(aten.add.Tensor, Call(aten.mul.Tensor, Node("x"), Number("k")), Node("y"))
    found = match(pattern, last(graph()))
    assert found is not None
    assert (found["x"].name, found["k"], found["y"].name) == ("x", 2.0, "y")


def test_one_name_is_one_node() -> None:
    pattern = Call(aten.add.Tensor, Node("y"), Call(aten.mul.Tensor, Node("y"), Number()))
    assert match(pattern, last(graph())) is None


def test_numbers_conditions_and_alternatives() -> None:
    node = last(graph())
    assert (
        match(
            Call(aten.add.Tensor, Node("y"), Call(aten.mul.Tensor, Node("x"), Number(value=3))),
            node,
        )
        is None
    )
    assert match(Node("n", where=lambda n: n.op == "placeholder"), node) is None
    assert match(Either((Call(aten.sub.Tensor), Call(aten.add.Tensor))), node) == {}
