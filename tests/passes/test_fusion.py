from __future__ import annotations

import torch

from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.passes.fusion.fuse_linears import FuseLinears
from einfold.compiler.passes.fusion.fuse_residual_norms import FuseResidualNorms
from einfold.compiler.passes.fusion.select_logit_rows import SelectLogitRows
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights

from ..programs import calls, program, run

SIBLINGS = """
    weight @a.q_proj.weight : f32[8, 4]
    weight @a.q_proj.bias : f32[8]
    weight @a.k_proj.weight : f32[2, 4]
    input %x "x" : f32[B, S, 4]
    read %wq "a.q_proj.weight" : f32[8, 4]
    read %bq "a.q_proj.bias" : f32[8]
    read %wk "a.k_proj.weight" : f32[2, 4]
    call %q = einfold.linear(%x, %wq, %bq) : f32[B, S, 8]
    call %k = einfold.linear(%x, %wk, none) : f32[B, S, 2]
    output "q" = %q
    output "k" = %k
"""


def test_siblings_become_one_product() -> None:
    found = program(SIBLINGS)
    x = torch.randn(2, 3, 4)
    want = run(found, x=x)
    result = FuseLinears().run(found)
    assert calls(found)[:2] == [
        "einfold.linear(%x, %a.q_k.weight, %a.q_k.bias)",
        "aten.split_with_sizes.default(%1, [8, 2], -1)",
    ]
    assert list(found.weights) == ["a.q_k.weight", "a.q_k.bias"]
    got = run(found, x=x)
    for name in want:
        torch.testing.assert_close(got[name], want[name])
    assert result.notes[0].where == "a"


def test_siblings_that_share_a_weight_stay() -> None:
    found = program("""
        weight @w : f32[8, 4]
        input %x "x" : f32[B, 4]
        read %w "w" : f32[8, 4]
        call %a = einfold.linear(%x, %w, none) : f32[B, 8]
        call %b = einfold.linear(%x, %w, none) : f32[B, 8]
        output "a" = %a
        output "b" = %b
    """)
    result = FuseLinears().run(found)
    assert not result.changed
    assert "share one weight" in result.notes[0].what


#: A router that masks its scores before it ranks them, and two projections of the same input.
GROUPS = """
    weight @g : f32[4, 8]
    weight @a.u : f32[6, 8]
    weight @a.v : f32[6, 8]
    weight @b : f32[4]
    input %x "x" : f32[B, 8]
    read %g "g" : f32[4, 8]
    read %u "a.u" : f32[6, 8]
    read %v "a.v" : f32[6, 8]
    read %b "b" : f32[4]
    call %l = einfold.linear(%x, %g, none) : f32[B, 4]
    call %s = aten.sigmoid.default(%l) : f32[B, 4]
    call %c = aten.add.Tensor(%s, %b) : f32[B, 4]
    call %r = aten.reshape.default(%c, [-1, 2, 2]) : f32[B, 2, 2]
    call %m = aten.flatten.using_ints(%r, 1, 2) : f32[B, 4]
    call %t = aten.topk.default(%m, 2) : (f32[B, 2], i64[B, 2])
    call %i = builtin.getitem(%t, 1) : i64[B, 2]
    call %y = einfold.linear(%x, %u, none) : f32[B, 6]
    call %z = einfold.linear(%x, %v, none) : f32[B, 6]
    output "i" = %i
    output "y" = %y
    output "z" = %z
"""


def test_a_router_stays_by_itself_and_is_not_rounded() -> None:
    found = program(GROUPS)
    FuseLinears().run(found)
    assert [call for call in calls(found) if "linear" in call] == [
        "einfold.linear(%x, %g, none)",
        "einfold.linear(%x, %a.u_v.weight, none)",
    ]
    notes = QuantizeWeights(Grouped(4, 16)).run(found).notes
    assert [(note.where, note.action) for note in notes] == [
        ("g", "skipped"),
        ("a.u_v.weight", "applied"),
    ]


def test_residual_and_norm() -> None:
    found = program("""
        weight @w : f32[4]
        input %x "x" : f32[B, 4]
        input %y "y" : f32[B, 4]
        read %w "w" : f32[4]
        call %s = aten.add.Tensor(%x, %y) : f32[B, 4]
        call %n = einfold.rms_norm(%s, %w, 1e-06) : f32[B, 4]
        call %z = aten.add.Tensor(%s, %n) : f32[B, 4]
        output "z" = %z
    """)
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    want = run(found, x=x, y=y)["z"]
    FuseResidualNorms().run(found)
    assert calls(found) == [
        "einfold.add_rms_norm(%x, %y, %w, 1e-06)",
        "builtin.getitem(%1, 0)",
        "builtin.getitem(%1, 1)",
        "aten.add.Tensor(%3, %2)",
    ]
    torch.testing.assert_close(run(found, x=x, y=y)["z"], want)


def test_an_addition_that_broadcasts_stays() -> None:
    found = program("""
        weight @w : f32[4]
        input %x "x" : f32[B, 4]
        input %y "y" : f32[4]
        read %w "w" : f32[4]
        call %s = aten.add.Tensor(%x, %y) : f32[B, 4]
        call %n = einfold.rms_norm(%s, %w, 1e-06) : f32[B, 4]
        output "n" = %n
    """)
    result = FuseResidualNorms().run(found)
    assert not result.changed
    assert "broadcasts" in result.notes[0].what


HEAD = """
    weight @e : f32[11, 8]
    input %ids "input_ids" : i64[B, S]
    read %e "e" : f32[11, 8]
    call %h = einfold.embedding(%ids, %e) : f32[B, S, 8]
    call %l = einfold.linear(%h, %e, none) : f32[B, S, 11]
    call %d = aten.div.Tensor(%l, 30.0) : f32[B, S, 11]
    call %t = aten.tanh.default(%d) : f32[B, S, 11]
    output "logits" = %t
"""


def test_the_head_runs_on_the_rows_that_are_asked_for() -> None:
    found = program(HEAD)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    want = run(found, input_ids=ids)["logits"].flatten(0, 1)
    SelectLogitRows().run(found)
    rows = torch.tensor([5, 0, 0])
    got = run(found, input_ids=ids, logit_rows=rows)["logits"]
    torch.testing.assert_close(got, want[rows])
    assert calls(found)[1] == "einfold.select_rows(%1, %logit_rows)"


def test_logits_without_a_linear_are_left() -> None:
    found = program("""
        weight @e : f32[11, 8]
        input %ids "input_ids" : i64[B, S]
        read %e "e" : f32[11, 8]
        call %h = einfold.embedding(%ids, %e) : f32[B, S, 8]
        output "logits" = %h
    """)
    result = SelectLogitRows().run(found)
    assert not result.changed
    assert "all rows are computed" in result.notes[0].what
