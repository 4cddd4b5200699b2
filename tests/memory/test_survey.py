"""What a program allocates, what is written in place, and why other results are not."""

from __future__ import annotations

import torch

from einfold.compiler.ir.ops.record import OPERATORS
from einfold.compiler.ir.program import Program
from einfold.compiler.memory.planning import LINE, plan_memory
from einfold.compiler.memory.sharing import apart
from einfold.compiler.memory.survey import inputs_at, survey

from ..programs import program

DIMS = {"B": 2, "S": 8}
ROW = 2 * 8 * 4  # bytes of one number for each token


def storages(found: Program) -> list[tuple[str, int]]:
    """The calls that allocate, and their bytes."""
    made = survey(found, inputs_at(found, DIMS)).made.values()
    return [(each.node.name, each.size) for each in made]


def test_views_allocate_nothing_and_reshapes_only_where_they_must_copy() -> None:
    found = program("""
        input %x "x" : f32[B, S, 4]
        call %a = aten.exp.default(%x) : f32[B, S, 4]
        call %split = aten.split_with_sizes.default(%a, [1, 3], -1) : (f32[B, S, 1], f32[B, S, 3])
        call %part = builtin.getitem(%split, 1) : f32[B, S, 3]
        call %turned = aten.transpose.int(%a, 1, 2) : f32[B, 4, S]
        call %flat = aten.reshape.default(%a, [-1, 4]) : f32[B*S, 4]
        call %copied = aten.reshape.default(%turned, [-1]) : f32[4*B*S]
        output "part" = %part
        output "flat" = %flat
        output "copied" = %copied
    """)
    assert storages(found) == [("a", 4 * ROW), ("copied", 4 * ROW)]


def test_inputs_and_what_looks_at_them_are_not_of_the_arena() -> None:
    found = program("""
        input %x "x" : f32[B, S, 4]
        call %flat = aten.reshape.default(%x, [-1, 4]) : f32[B*S, 4]
        call %y = aten.exp.default(%flat) : f32[B*S, 4]
        output "y" = %y
    """)
    assert storages(found) == [("y", 4 * ROW)]
    inputs = inputs_at(found, DIMS)
    assert not plan_memory(found, inputs).sharing.in_place  # an input is not overwritten
    [[[node, _], reason]] = plan_memory(found, inputs).sharing.refused.items()
    assert (node.name, reason) == ("y", ["is an input or a weight"])


def test_the_last_reader_writes_in_place() -> None:
    found = program("""
        input %x "x" : f32[B, S, 4]
        call %a = aten.exp.default(%x) : f32[B, S, 4]
        call %b = aten.neg.default(%a) : f32[B, S, 4]
        call %c = aten.add.Tensor(%a, %b) : f32[B, S, 4]
        call %d = aten.exp.default(%c) : f32[B, S, 4]
        output "d" = %d
    """)
    plan = plan_memory(found, inputs_at(found, DIMS))
    written = {node.name: argument.name for (node, _), argument in plan.sharing.in_place.items()}
    assert written == {"c": "a", "d": "c"}
    assert {n.name: why for (n, _), why in plan.sharing.refused.items()} == {
        "a": ["is an input or a weight"],
        "b": ["is read later"],
    }
    assert plan.arena == plan.bound == 2 * 4 * ROW
    assert plan_memory(found, inputs_at(found, DIMS), in_place=False).arena == 3 * 4 * ROW


def test_results_stay_and_other_forms_are_not_overwritten() -> None:
    found = program("""
        input %x "x" : f32[B, S, 4]
        call %a = aten.exp.default(%x) : f32[B, S, 4]
        call %b = aten.neg.default(%a) : f32[B, S, 4]
        call %small = aten.sum.dim_IntList(%b, [-1], true) : f32[B, S, 1]
        call %c = aten.add.Tensor(%small, %x) : f32[B, S, 4]
        call %e = aten.gt.Tensor(%c, %x) : bool[B, S, 4]
        output "a" = %a
        output "e" = %e
    """)
    refused = plan_memory(found, inputs_at(found, DIMS)).sharing.refused
    said = {node.name: why for (node, _), why in refused.items()}
    assert said["b"] == ["is read later"]  # by whoever asked for it
    assert said["c"] == ["has another shape or type", "is an input or a weight"]
    assert said["e"] == ["has another shape or type", "is an input or a weight"]


GATED = """
    input %x "x" : f32[B, S, 4]
    read %w "w" : f32[8, 4]
    read %v "v" : f32[4, 4]
    call %both = einfold.linear(%x, %w, none) : f32[B, S, 8]
    call %split = aten.split_with_sizes.default(%both, [4, 4], -1) : (f32[B, S, 4], f32[B, S, 4])
    call %gate = builtin.getitem(%split, 0) : f32[B, S, 4]
    call %up = builtin.getitem(%split, 1) : f32[B, S, 4]
    call %hidden = einfold.gated_activation(%gate, %up, "silu") : f32[B, S, 4]
    call %y = einfold.linear(%hidden, %v, none) : f32[B, S, 4]
    output "y" = %y
"""


def gated() -> Program:
    weights = "weight @w : f32[8, 4]\nweight @v : f32[4, 4]\n"
    return program(weights + GATED)


def test_a_gate_is_overwritten_beside_its_up() -> None:
    found = gated()
    plan = plan_memory(found, inputs_at(found, DIMS))
    [(node, at)] = plan.sharing.in_place
    assert (node.name, at, plan.sharing.in_place[node, at].name) == ("hidden", 0, "gate")
    assert plan.arena == plan.bound == (8 + 4) * ROW


def test_what_torch_sums_keeps_its_strides() -> None:
    """Rows that lie further apart are added in another order by some library: other bits."""
    found = program("""
        weight @w : f32[4, 4]
        input %x "x" : f32[B, S, 8]
        read %w "w" : f32[4, 4]
        call %both = aten.exp.default(%x) : f32[B, S, 8]
        call %split = aten.split_with_sizes.default(%both, [4, 4], -1) : (f32[B, S, 4], f32[B, S, 4])
        call %gate = builtin.getitem(%split, 0) : f32[B, S, 4]
        call %up = builtin.getitem(%split, 1) : f32[B, S, 4]
        call %silu = aten.silu.default(%gate) : f32[B, S, 4]
        call %hidden = aten.mul.Tensor(%silu, %up) : f32[B, S, 4]
        call %rows = aten.reshape.default(%hidden, [-1, 4]) : f32[B*S, 4]
        call %y = aten.mm.default(%rows, %w) : f32[B*S, 4]
        output "y" = %y
    """)
    sharing = plan_memory(found, inputs_at(found, DIMS)).sharing
    written = {node.name: argument.name for (node, _), argument in sharing.in_place.items()}
    assert written == {"silu": "gate"}  # a product of elements reads it
    said = {node.name: why for (node, _), why in sharing.refused.items()}
    assert said["hidden"] == ["has other strides, and is summed"] * 2


def test_an_operator_of_einfolds_overwrites_what_it_names() -> None:
    for kind in OPERATORS.values():
        for names in kind.overwrites:
            assert names and set(names) <= kind.__dataclass_fields__.keys(), kind.name


def test_sums_and_norms_lie_where_their_arguments_did() -> None:
    found = program("""
        weight @w : f32[4]
        input %x "x" : f32[B, S, 4]
        read %w "w" : f32[4]
        call %a = aten.exp.default(%x) : f32[B, S, 4]
        call %b = aten.neg.default(%x) : f32[B, S, 4]
        call %both = einfold.add_rms_norm(%a, %b, %w, 1e-05) : (f32[B, S, 4], f32[B, S, 4])
        call %norm = builtin.getitem(%both, 0) : f32[B, S, 4]
        call %total = builtin.getitem(%both, 1) : f32[B, S, 4]
        output "norm" = %norm
        output "total" = %total
    """)
    plan = plan_memory(found, inputs_at(found, DIMS))
    written = {at: argument.name for (_, at), argument in plan.sharing.in_place.items()}
    assert written == {0: "a", 1: "b"}
    assert plan.arena == plan.bound == (4 + 4) * ROW


def test_parts_of_rows_are_apart() -> None:
    rows = torch.empty(2, 5, 12)
    first, second, third = rows.split(4, -1)
    assert apart(first, second) and apart(third, first)
    assert not apart(first, rows[..., 2:6]) and not apart(first, first)
    assert apart(rows[0], rows[1]) and apart(first, second.mT) and not apart(first, first.mT)
    assert apart(rows[:, 0], rows[:, 1])


def test_queries_are_apart_from_keys_of_fewer_heads() -> None:
    row = torch.empty(2, 5, 8 * 3)
    q, k, v = (part.unflatten(-1, (-1, 3)) for part in row.split([12, 6, 6], -1))
    assert apart(q, k) and apart(q, v) and apart(k, v) and apart(k, q)
    assert not apart(q, row[..., 9:15].unflatten(-1, (-1, 3)))
    assert apart(row[:1], row[1:]) and not apart(row[:2], row[1:])
    assert not apart(q, k.double())


def test_attention_is_written_over_its_queries_and_a_part_over_the_whole() -> None:
    found = program("""
        input %x "x" : f32[B, S, 4]
        call %a = aten.exp.default(%x) : f32[B, S, 4]
        call %h = aten.unflatten.int(%a, -1, [2, 2]) : f32[B, S, 2, 2]
        call %k = aten.neg.default(%h) : f32[B, S, 2, 2]
        call %o = einfold.attention(%h, %k, %k, none, 0, 1.0, 0, 0.0) : f32[B, S, 2, 2]
        call %p = aten.slice.Tensor(%o, 3, 0, 1) : f32[B, S, 2, 1]
        call %e = aten.exp.default(%p) : f32[B, S, 2, 1]
        call %y = aten.slice_scatter.default(%o, %e, 3, 1, 2) : f32[B, S, 2, 2]
        output "y" = %y
    """)
    plan = plan_memory(found, inputs_at(found, DIMS))
    written = {node.name: argument.name for (node, _), argument in plan.sharing.in_place.items()}
    assert written["o"] == "h" and written["y"] == "o"


def test_buffers_are_whole_lines() -> None:
    found = program("""
        input %x "x" : f32[B]
        call %y = aten.exp.default(%x) : f32[B]
        output "y" = %y
    """)
    assert plan_memory(found, inputs_at(found, {"B": 3})).arena == LINE
