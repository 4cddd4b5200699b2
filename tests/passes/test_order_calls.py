"""order_calls: a better order, one that stays, and the same numbers."""

from __future__ import annotations

import torch

from einfold.compiler.passes.memory.order_calls import OrderCalls

from ..programs import calls, program, run

BRANCHES = """
    weight @wide : f32[64, 4]
    weight @narrow : f32[4, 64]
    input %x "x" : f32[B, S, 4]
    read %wide "wide" : f32[64, 4]
    read %narrow "narrow" : f32[4, 64]
    call %a = einfold.linear(%x, %wide, none) : f32[B, S, 64]
    call %b = aten.exp.default(%a) : f32[B, S, 64]
    call %c = einfold.linear(%x, %wide, none) : f32[B, S, 64]
    call %d = einfold.linear(%b, %narrow, none) : f32[B, S, 4]
    call %e = einfold.linear(%c, %narrow, none) : f32[B, S, 4]
    call %f = aten.add.Tensor(%d, %e) : f32[B, S, 4]
    output "f" = %f
"""


def test_one_branch_after_the_other() -> None:
    found = program(BRANCHES)
    result = OrderCalls(tokens=16).run(found)
    assert calls(found) == [
        "einfold.linear(%x, %wide, none)",
        "aten.exp.default(%1)",
        "einfold.linear(%2, %narrow, none)",
        "einfold.linear(%x, %wide, none)",
        "einfold.linear(%4, %narrow, none)",
        "aten.add.Tensor(%3, %5)",
    ]
    assert result.changed
    told = {note.where: (note.action, note.what) for note in result.notes}
    wide, narrow = 16 * 64 * 4, 16 * 4 * 4
    assert told["graph"] == (
        "applied",
        f"calls reordered: {2 * wide + narrow:,} to {wide + 2 * narrow:,} bytes, no order holds less",
    )
    assert told["%b"] == ("applied", "aten.exp.default may write over %a")


def test_an_order_that_holds_no_more_stays() -> None:
    found = program("""
        input %x "x" : f32[B, S, 4]
        call %a = aten.exp.default(%x) : f32[B, S, 4]
        call %b = aten.neg.default(%x) : f32[B, S, 4]
        call %c = aten.mul.Tensor(%a, %a) : f32[B, S, 4]
        output "b" = %b
        output "c" = %c
        output "a" = %a
    """)
    before = calls(found)
    result = OrderCalls(tokens=16).run(found)
    assert calls(found) == before and not result.changed
    told = [(note.action, note.where, note.what) for note in result.notes]
    size = 16 * 4 * 4
    alone = "1 result in memory of its own: an argument"
    assert told == [
        (
            "applied",
            "arena",
            f"{3 * size:,} bytes of intermediate values for 16 new tokens, the peak of live bytes; "
            f"{3 * size:,} with nothing in place",
        ),
        ("skipped", "aten.exp.default", f"{alone} is an input or a weight"),
        ("skipped", "aten.neg.default", f"{alone} is an input or a weight"),
        ("skipped", "aten.mul.Tensor", f"{alone} is read later"),
    ]


def test_the_numbers_stay() -> None:
    found, x = program(BRANCHES), torch.randn(2, 3, 4)
    before = run(found, x=x)["f"]
    OrderCalls().run(found)
    assert torch.equal(run(found, x=x)["f"], before)
