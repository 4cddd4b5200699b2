"""Which super-ops stay in memory: the budget holds, no other choice reads less, and what a step takes."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from einfold.compiler.ir.device import Device
from einfold.compiler.memory.leveling import AHEAD
from einfold.compiler.memory.pinning import PACKED
from einfold.compiler.memory.placing import place
from einfold.compiler.memory.tiers import Choice, Fixed, Load, Piece, Skew, TierPlan, step_of
from einfold.compiler.memory.timeline import timeline_of
from einfold.errors import RecipeError

FIXED = Fixed(process=100, cache=20, activations=5)


def load(*sizes: int, packed: float = 1.0) -> Load:
    pieces = [Piece(f"layer {i}", size, int(size * packed)) for i, size in enumerate(sizes)]
    return Load(tuple(pieces), FIXED)


def every_plan(found: Load, budget: int) -> list[TierPlan]:
    names = [piece.name for piece in found.pieces]
    chosen = chain.from_iterable(combinations(names, k) for k in range(len(names) + 1))
    return [TierPlan(found.pieces, frozenset(c), found.fixed, budget) for c in chosen]


@pytest.mark.parametrize(
    ("sizes", "budget", "streamed"),
    [
        ((10, 10, 10, 10), 185, []),  # all, and what packing the last takes twice over
        ((10, 10, 10, 10), 175, ["layer 1", "layer 2", "layer 3"]),
        ((10, 10, 10, 10, 10), 185, ["layer 1", "layer 3", "layer 4"]),  # evenly
        (
            (10, 10, 10, 10, 20),
            185,
            ["layer 0", "layer 1", "layer 2", "layer 3"],
        ),  # the large one would need buffers of its size
        ((0, 10), 155, []),  # what has no weights is nowhere
    ],
)
def test_what_stays(sizes: tuple[int, ...], budget: int, streamed: list[str]) -> None:
    plan = place(load(*sizes), budget)
    assert [piece.name for piece in plan.streamed] == streamed
    assert plan.fetched == sum(piece.nbytes for piece in plan.streamed)
    assert plan.peak <= budget


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(0, 40))
def test_the_budget_holds_and_equal_super_ops_leave_nothing_better(
    sizes: list[int], more: int
) -> None:
    equal = load(*([10] * len(sizes)), packed=1.3)
    for found in (load(*sizes, packed=1.2), equal):
        plans = every_plan(found, 0)
        budget = min(plan.peak for plan in plans) + more
        plan = place(found, budget)
        assert plan.peak <= budget
        if found is equal:
            best = min(other.fetched for other in plans if other.peak <= budget)
            assert plan.fetched == best


def test_pages_come_before_packing_where_something_is_streamed() -> None:
    """Nothing is packed in a step, and no more is held than pages of those that are read ahead."""
    found = load(10, 10, 10, 10, packed=3.0)
    paged = replace(found, paged=tuple(Piece(p.name, p.nbytes, 12) for p in found.pieces))
    plan = place(paged, 125 + 12 + AHEAD * 12)
    # Of each half stays, so that what is read ahead are two halves.
    assert (plan.paged, set(plan.parts.values()), plan.buffers, plan.peak) == (True, {6}, 12, 161)
    # Where the device was measured: what is left of one, a byte that is read in time and three under way.
    plan = place(paged, 125 + 12 + AHEAD * 12, Device(source="measured"))
    assert (set(plan.parts.values()), plan.beside, plan.buffers) == ({6, 7}, 4, 10)
    assert plan.peak == 161
    # Where computing takes as long there is room for as much again.
    slow = Device(ram_bandwidth=1e9, disk_bandwidth=1e9, source="measured")
    plan = place(paged, 125 + 12 + AHEAD * 12, slow)
    assert (set(plan.parts.values()), plan.beside, plan.buffers) == ({6}, None, 12)
    device = Device(ram_bandwidth=1e3, disk_bandwidth=10, pack_bandwidth=5)
    assert (step_of(plan, device).disk, step_of(plan, device).packing) == (2.0, 0.0)
    assert step_of(place(found, 210), device).packing > 0
    assert not place(paged, 1000).paged  # nothing is streamed
    refused = replace(found, remark="no room")
    assert (place(refused, 210).paged, place(refused, 210).remark) == (False, "no room")


def test_packing_comes_where_pages_would_not_fit() -> None:
    found = load(10, 10, 10)
    paged = replace(found, paged=tuple(Piece(p.name, p.nbytes, 50) for p in found.pieces))
    plan = place(paged, 125 + AHEAD * 10 + PACKED * 10)
    assert not plan.paged
    assert plan.streamed
    with pytest.raises(RecipeError, match="too small: 165 are needed"):
        place(paged, 164)


def test_of_a_gpu_super_ops_stay_whole_and_nothing_is_packed() -> None:
    """No plan of whole super-ops beside two buffers of the largest streamed one copies less."""
    for sizes in ((10, 10, 10, 10), (4, 11, 6, 4, 11, 6, 30), (7, 3)):
        found = replace(load(*sizes), home="host")
        plans = [replace(plan, home="host") for plan in every_plan(found, 0)]
        for plan in plans:
            streamed = [piece.held for piece in plan.streamed]
            assert plan.buffers == min(AHEAD, len(streamed)) * max(streamed, default=0)
            assert plan.peak == 125 + sum(piece.held for piece in plan.kept) + plan.buffers
        for budget in range(min(plan.peak for plan in plans), 125 + sum(sizes) + 1):
            plan = place(found, budget)
            assert plan.peak <= budget and (plan.home, plan.paged, plan.packs) == (
                "host",
                False,
                False,
            )
            assert plan.fetched == min(p.fetched for p in plans if p.peak <= budget)
    device = Device(
        gpu_bandwidth=100.0, link_bandwidth=5.0, gpu_memory=7, gpu_source="measured"
    ).gpu()
    plan = place(replace(load(10, 10, 10), home="host"), 145)
    assert (device.ram, device.source) == (7, "measured")
    step = step_of(plan, device)
    assert (step.disk, step.packing, step.compute, step.bound) == (6.0, 0.0, 0.5, "disk")
    assert timeline_of(plan, device).seconds == pytest.approx(6.0)
    shared = replace(load(10, 10), fixed=replace(FIXED, shared=3), home="host")
    assert place(shared, 148).peak == 148
    with pytest.raises(RecipeError, match=r"148 are needed .* weights of no super-op alone 3 and"):
        place(shared, 147)


def test_what_is_too_small_says_what_would_do() -> None:
    found = load(10, 10, 10)
    least = 125 + AHEAD * 10 + PACKED * 10
    assert place(found, least).fetched == 30
    with pytest.raises(
        RecipeError, match=rf"too small: {least} are needed at least, .* the cache 20"
    ):
        place(found, least - 1)
    with pytest.raises(RecipeError, match=r"cannot be pages of a file: no room\)$"):
        place(replace(found, remark="no room"), least - 1)


def test_a_step_takes_what_its_slowest_part_takes() -> None:
    plan = place(load(10, 10, 10), 165)
    slow_disk = Device(ram_bandwidth=100.0, disk_bandwidth=2.0, pack_bandwidth=10.0)
    assert step_of(plan, slow_disk).bound == "disk"
    assert step_of(plan, slow_disk).seconds == 15.0  # (W - C) / bandwidth
    slow_packing = Device(ram_bandwidth=100.0, disk_bandwidth=20.0, pack_bandwidth=10.0)
    assert step_of(plan, slow_packing).bound == "packing"
    assert step_of(plan, slow_packing).seconds == pytest.approx(3.0 + 0.5)
    slow_memory = Device(ram_bandwidth=10.0, disk_bandwidth=20.0, pack_bandwidth=10.0)
    assert step_of(plan, slow_memory).bound == "compute"


def with_experts(layers: int, skew: Skew | None = None) -> Load:
    """Layers of 2 bytes that every token reads and experts of 16, of which a token reads 4."""
    pieces = list[Piece]()
    for layer in range(layers):
        pieces.append(Piece(f"layer {layer}", 2, 2))
        pieces.append(Piece(f"layer {layer} experts", 16, 16, Choice(4, 4)))
    whole = tuple(replace(piece, choice=None) for piece in pieces)
    return Load(whole, FIXED, tuple(pieces), skew=skew or Skew())


def test_what_every_token_reads_is_pinned_and_of_experts_some_stay() -> None:
    plan = place(with_experts(4), 125 + 8 + 32 + 8)
    assert [piece.name for piece in plan.kept] == [f"layer {n}" for n in range(4)]
    assert (plan.room, plan.buffers, plan.ahead) == (8, 32, 4)
    # A step of one token needs 4 of the 32 bytes that a prompt reads ahead: the others hold experts.
    assert plan.cached == 8 + 32 - 4
    assert plan.hits == pytest.approx((36 / 64) ** 0.5)
    assert plan.fetched == 4 * round(4 * (1 - 6 / 8))
    assert (plan.prompt, plan.peak) == (64, 125 + 48)


@given(st.integers(1, 5), st.integers(0, 90), st.sampled_from([0.3, 1.0, 1.6]))
def test_experts_and_pinned_layers_share_the_budget_as_reads_least(
    layers: int, more: int, exponent: float
) -> None:
    found = with_experts(layers, Skew(exponent, measured=True))
    plain = TierPlan(found.paged, frozenset(), FIXED, 0, paged=True, skew=found.skew)
    budget = plain.peak + more
    plan = place(found, budget)
    assert plan.peak <= budget
    others = [replace(plan, pinned=other.pinned, room=0) for other in every_plan(found, budget)]
    for other in others:
        if other.peak <= budget:
            lacking = max(other.experts - other.cached, 0)
            filled = replace(other, room=min(lacking, budget - other.peak))
            # Kinds are pinned one behind the other, what every token reads first.
            first = all(f"layer {n}" in filled.pinned for n in range(layers))
            assert not first or plan.fetched <= filled.fetched


def test_what_a_run_found_of_experts_is_what_a_plan_expects() -> None:
    assert Skew().hits(0.25) == 0.5
    found = Skew.of(0.5, 0.5**0.25)
    assert (found.exponent, found.measured) == (pytest.approx(0.25), True)
    assert found.hits(0.0625) == pytest.approx(0.5)
    assert (found.hits(0.0), found.hits(1.0)) == (0.0, 1.0)
    for part, hits in ((0.0, 0.5), (0.5, 0.0), (1.0, 1.0), (float("nan"), 0.5)):
        assert Skew.of(part, hits) == Skew()
    assert Skew.of(0.5, 1e-9).exponent == 2.0  # what chance found


def test_experts_are_read_when_they_are_chosen_and_not_ahead() -> None:
    plan = place(with_experts(4), 125 + 8 + 32 + 8)
    step = step_of(plan, Device(ram_bandwidth=40.0, disk_bandwidth=4.0, pack_bandwidth=1.0))
    assert step.chosen == step.disk == plan.fetched / 4.0
    assert step.compute == (8 + 4 * 4 + 20) / 40.0
    assert step.seconds == step.chosen + step.compute
    assert place(load(10, 10, 10), 165).routed == ()


def test_what_a_disk_has_free_meanwhile_makes_no_other_plan() -> None:
    """Others write to it between two plans of one artifact."""
    load = Load((Piece("layer", 10, 20),), Fixed(1, 2, 3))
    assert replace(load, disk=5) == load != replace(load, unit=5)
