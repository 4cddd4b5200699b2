from __future__ import annotations

import torch

from einfold.compiler.passes.cleanup.fold_constants import FoldConstants
from einfold.compiler.passes.cleanup.simplify import Simplify

from ..programs import calls, program, run


def test_simplify_removes_reshapes_of_reshapes_and_dead_nodes() -> None:
    found = program("""
        input %x "x" : f32[B, S, 6]
        call %a = aten.reshape.default(%x, [-1, 6]) : f32[B*S, 6]
        call %b = aten.reshape.default(%a, [-1, 2, 3]) : f32[B*S, 2, 3]
        call %dead = aten.neg.default(%a) : f32[B*S, 6]
        output "y" = %b
    """)
    result = Simplify().run(found)
    assert result.changed
    assert calls(found) == ["aten.reshape.default(%x, [-1, 2, 3])"]


def test_transposes_pass_through_norms_and_cancel() -> None:
    found = program("""
        weight @w : f32[16]
        input %x "x" : f32[B, S, 4, 16]
        read %w "w" : f32[16]
        call %a = aten.transpose.int(%x, 1, 2) : f32[B, 4, S, 16]
        call %b = einfold.rms_norm(%a, %w, 1e-06) : f32[B, 4, S, 16]
        call %c = aten.transpose.int(%b, -3, -2) : f32[B, S, 4, 16]
        output "y" = %c
    """)
    Simplify().run(found)
    assert calls(found) == ["einfold.rms_norm(%x, %w, 1e-06)"]


def test_transposes_pass_through_splits() -> None:
    found = program("""
        input %x "x" : f32[B, S, 4, 6]
        call %a = aten.transpose.int(%x, 1, 2) : f32[B, 4, S, 6]
        call %b = aten.split_with_sizes.default(%a, [2, 4], -1) : (f32[B, 4, S, 2], f32[B, 4, S, 4])
        call %c = builtin.getitem(%b, 1) : f32[B, 4, S, 4]
        call %d = aten.transpose.int(%c, 1, 2) : f32[B, S, 4, 4]
        output "y" = %d
    """)
    x = torch.randn(2, 3, 4, 6)
    want = run(found, x=x)["y"]
    Simplify().run(found)
    assert calls(found) == [
        "aten.split_with_sizes.default(%x, [2, 4], -1)",
        "builtin.getitem(%1, 1)",
    ]
    assert torch.equal(run(found, x=x)["y"], want)


def test_a_transpose_of_the_last_axis_stays() -> None:
    body = """
        weight @w : f32[4]
        input %x "x" : f32[B, 4, 8]
        read %w "w" : f32[4]
        call %a = aten.transpose.int(%x, 1, 2) : f32[B, 8, 4]
        call %b = einfold.rms_norm(%a, %w, 1e-06) : f32[B, 8, 4]
        output "y" = %b
    """
    found = program(body)
    before = calls(found)
    assert not Simplify().run(found).changed
    assert calls(found) == before


def test_slices_that_cut_an_axis_become_a_split() -> None:
    found = program("""
        input %x "x" : f32[B, 8]
        call %b = aten.slice.Tensor(%x, -1, 3, 9223372036854775807) : f32[B, 5]
        call %a = aten.slice.Tensor(%x, -1, 0, 3) : f32[B, 3]
        call %s = aten.sum.dim_IntList(%b, [1], true) : f32[B, 1]
        call %y = aten.add.Tensor(%a, %s) : f32[B, 3]
        output "y" = %y
    """)
    x = torch.randn(2, 8)
    want = run(found, x=x)["y"]
    Simplify().run(found)
    assert calls(found)[0] == "aten.split_with_sizes.default(%x, [3, 5], -1)"
    assert torch.equal(run(found, x=x)["y"], want)


def test_slices_that_leave_a_gap_stay() -> None:
    found = program("""
        input %x "x" : f32[B, 8]
        call %a = aten.slice.Tensor(%x, -1, 0, 3) : f32[B, 3]
        call %b = aten.slice.Tensor(%x, -1, 4, 7) : f32[B, 3]
        call %y = aten.add.Tensor(%a, %b) : f32[B, 3]
        output "y" = %y
    """)
    assert not Simplify().run(found).changed


def test_equal_calls_are_one() -> None:
    found = program("""
        input %x "x" : f32[B, 8]
        call %a = aten.neg.default(%x) : f32[B, 8]
        call %b = aten.neg.default(%x) : f32[B, 8]
        call %y = aten.add.Tensor(%a, %b) : f32[B, 8]
        output "y" = %y
    """)
    Simplify().run(found)
    assert calls(found) == ["aten.neg.default(%x)", "aten.add.Tensor(%1, %1)"]


def test_constants_fold_when_they_are_written() -> None:
    found = program(
        """
        weight @w : f32[4]
        input %x "x" : f32[B, 4]
        read %w "w" : f32[4]
        call %s = aten.add.Tensor(%w, 1.0) : f32[4]
        call %t = aten.mul.Tensor(%s, %s) : f32[4]
        call %y = aten.mul.Tensor(%x, %t) : f32[B, 4]
        output "y" = %y
        """,
        w=torch.tensor([0.0, 1.0, 2.0, 3.0]),
    )
    FoldConstants().run(found)
    assert len(calls(found)) == 1
    (name,) = list(found.weights)
    assert found.weights[name].load().tolist() == [1.0, 4.0, 9.0, 16.0]


def test_what_depends_on_an_input_is_not_folded() -> None:
    found = program("""
        input %x "x" : f32[4]
        call %s = aten.add.Tensor(%x, 1.0) : f32[4]
        output "y" = %s
    """)
    assert not FoldConstants().run(found).changed
