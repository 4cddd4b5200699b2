"""Types of values that are computed once for arguments alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from einfold.compiler.frontend.dynamo import trace_function
from einfold.compiler.ir.program import Editor, ModelInfo, Program
from einfold.compiler.ir.types import Shapes

aten = torch.ops.aten


def program_of() -> tuple[Program, Editor, list[torch.fx.Node]]:
    program = Program(ModelInfo("", 0, 0))
    editor = Editor(program)
    return program, editor, [editor.input(name, ("B", 4), torch.float32) for name in "xy"]


def test_a_call_like_another_is_not_computed_again() -> None:
    program, editor, (x, y) = program_of()
    first = editor.call(aten.add.Tensor, x, y).meta["val"]
    program.shapes.mode = None  # type: ignore[assignment]  # nothing can be computed now
    assert editor.call(aten.add.Tensor, y, x).meta["val"] is first


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 1.0), (1, True), ([1, 4], [4, 1]), (torch.float32, torch.float16), (None, 0)],
)
def test_arguments_that_equal_each_other_are_told_apart(one: Any, other: Any) -> None:
    shapes = Shapes()
    given = [shapes.once((value,), lambda value=value: [value]) for value in (one, other, one)]
    assert given[0] is given[2] is not given[1]


def test_orders_in_memory_are_told_apart() -> None:
    _, editor, (x, _) = program_of()
    turned = editor.call(aten.transpose.int, x, 0, 1)
    back = editor.call(aten.clone.default, turned, memory_format=torch.contiguous_format)
    assert tuple(turned.meta["val"].shape) == tuple(back.meta["val"].shape)
    views = [editor.call(aten.mul.Tensor, each, 2.0).meta["val"] for each in (turned, back)]
    assert views[0].stride() != views[1].stride()


def test_sizes_that_the_data_decide_are_each_a_number_of_their_own() -> None:
    _, editor, inputs = program_of()
    first, second = (editor.call(aten.nonzero.default, each).meta["val"] for each in inputs)
    assert first.shape[0].node.expr != second.shape[0].node.expr


def test_what_has_no_hash_and_what_fails_is_computed_each_time() -> None:
    shapes, asked = Shapes(), []
    for value in ({1}, {1}):
        shapes.once((value,), lambda: asked.append(1))
    assert len(asked) == 2
    for _ in range(2):
        with pytest.raises(ValueError, match="no type"):
            shapes.once(("a",), _fail)


def _fail() -> None:
    raise ValueError("no type")


def test_a_type_that_two_values_share_is_traced_as_two_arguments() -> None:
    shapes = Shapes()
    x = shapes.tensor(("B", 4), torch.float32)
    traced = trace_function(torch.sub, [x, x], shapes.mode)
    (sub,) = traced.graph.find_nodes(op="call_function", target=aten.sub.Tensor)
    assert list(sub.args) == traced.graph.find_nodes(op="placeholder")
