"""The order of calls: beside every order there is, on graphs small enough for that."""

from __future__ import annotations

import random

import pytest
from torch import fx

from einfold.compiler.ir.program import Program
from einfold.compiler.memory.order import STATES, Search, best_order
from einfold.compiler.memory.survey import inputs_at, survey

from ..programs import program

DIMS = {"B": 1, "S": 16}

#: Two branches that widen and narrow again: one after the other holds one wide value at a time.
BRANCHES = """
    weight @wide : f32[64, 4]
    weight @narrow : f32[4, 64]
    input %x "x" : f32[B, S, 4]
    read %wide "wide" : f32[64, 4]
    read %narrow "narrow" : f32[4, 64]
    call %a = einfold.linear(%x, %wide, none) : f32[B, S, 64]
    call %b = einfold.linear(%x, %wide, none) : f32[B, S, 64]
    call %c = einfold.linear(%a, %narrow, none) : f32[B, S, 4]
    call %d = einfold.linear(%b, %narrow, none) : f32[B, S, 4]
    call %e = aten.add.Tensor(%c, %d) : f32[B, S, 4]
    output "e" = %e
"""


def search(found: Program) -> tuple[Search, list[fx.Node]]:
    nodes = [node for node in found.graph.nodes if node.op == "call_function"]
    return Search(nodes, found.output, survey(found, inputs_at(found, DIMS))), nodes


def random_program(seed: int) -> Program:
    """A few unary and binary calls over values of three widths."""
    draw = random.Random(seed)
    widths = {"%x": 4}
    lines = ['input %x "x" : f32[B, S, 4]']
    weights = []
    for at in range(draw.randint(4, 7)):
        source, new = draw.choice([*widths]), f"%v{at}"
        same = [each for each in widths if widths[each] == widths[source]]
        if draw.random() < 0.5:
            width = widths[source]
            lines.append(
                f"call {new} = aten.add.Tensor({source}, {draw.choice(same)}) : f32[B, S, {width}]"
            )
        else:
            width = draw.choice([1, 4, 16])
            weights.append(f"weight @w{at} : f32[{width}, {widths[source]}]")
            lines.append(f'read %w{at} "w{at}" : f32[{width}, {widths[source]}]')
            lines.append(
                f"call {new} = einfold.linear({source}, %w{at}, none) : f32[B, S, {width}]"
            )
        widths[new] = width
    kept = draw.sample([each for each in widths if each != "%x"], 2)
    lines += [f'output "{each[1:]}" = {each}' for each in kept]
    return program("\n".join(weights + lines))


def smallest(found: Search) -> int:
    """The smallest peak of all orders, one after the other."""

    def down(state: object) -> int:
        if state.ran == found.all:  # type: ignore[attr-defined]
            return state.peak  # type: ignore[attr-defined, no-any-return]
        return min(down(found.run(state, at)) for at in state.ready)  # type: ignore[attr-defined, arg-type]

    return down(found.first())


def test_branches_run_one_after_the_other() -> None:
    found = program(BRANCHES)
    order = best_order(found, survey(found, inputs_at(found, DIMS)))
    assert order.proved
    assert [node.name for node in order.nodes] == ["a", "c", "b", "d", "e"]


@pytest.mark.parametrize("seed", range(25))
def test_no_order_is_better(seed: int) -> None:
    found, nodes = search(random_program(seed))
    state = found.exact(STATES)
    assert state is not None
    assert sorted(state.order()) == [*range(len(nodes))]
    assert state.peak == smallest(found)
    assert found.beam(4).peak >= state.peak


@pytest.mark.parametrize("seed", range(10))
def test_every_order_runs_what_is_needed_first(seed: int) -> None:
    found, nodes = search(random_program(seed))
    order = [nodes[at] for at in found.beam(2).order()]
    for at, node in enumerate(order):
        assert not [each for each in node.all_input_nodes if each in order[at:]]


def test_a_search_that_takes_too_long_ends() -> None:
    found, _ = search(program(BRANCHES))
    assert found.exact(0) is None
