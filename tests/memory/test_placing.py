"""Placements are the best there are: by trying all where that can be done, and never behind simpler ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from einfold.compiler.ir.device import Device
from einfold.compiler.memory import placing
from einfold.compiler.memory.leveling import AHEAD, Units, come, in_proportion, least_level
from einfold.compiler.memory.pinning import Kind, least, needed, pin
from einfold.compiler.memory.placing import place
from einfold.compiler.memory.spill import Slots
from einfold.compiler.memory.tiers import Choice, Fixed, Load, Piece, TierPlan
from einfold.errors import RecipeError
from einfold.runtime.memory.direct import READERS

FIXED = Fixed(process=100, cache=20, activations=5)

UNITS = st.lists(
    st.builds(Units, st.integers(1, 4), st.sampled_from([0.5, 0.75, 1.0])), min_size=1, max_size=5
)


def every_way(
    units: list[Units], room: int, window: int, ahead: int
) -> list[tuple[float, tuple[int, ...]]]:
    """Bytes and counts of all ways that fit."""
    total = sum(each.count for each in units)
    return [
        (sum(each.cost * n for each, n in zip(units, counts, strict=True)), counts)
        for counts in product(*(range(each.count + 1) for each in units))
        if total - sum(counts) + ahead * max(*counts, window) <= room
    ]


@given(UNITS, st.integers(0, 24), st.integers(0, 4), st.integers(1, AHEAD))
def test_what_comes_reads_the_fewest_bytes(
    units: list[Units], room: int, window: int, ahead: int
) -> None:
    ways, counts = every_way(units, room, window, ahead), come(units, room, window, ahead)
    if counts is None:
        assert not ways
    else:
        found = sum(each.cost * n for each, n in zip(units, counts, strict=True))
        assert tuple(counts) in {chosen for _, chosen in ways}
        assert found == pytest.approx(min(cost for cost, _ in ways))


def test_there_is_room_for_a_unit_of_each_thread_that_reads() -> None:
    assert placing.UNDER_WAY == READERS


@given(UNITS, st.integers(0, 24), st.integers(1, AHEAD))
def test_what_comes_in_proportion_is_as_little_as_fits(
    units: list[Units], room: int, ahead: int
) -> None:
    total, most = sum(each.count for each in units), max(each.count for each in units)
    fitting = [
        counts
        for level in range(most + 1)
        for counts in [[-(-each.count * level // most) for each in units]]
        if total - sum(counts) + ahead * max(counts) <= room
    ]
    assert in_proportion(units, room, ahead) == min(fitting, key=sum, default=None)


@given(UNITS, st.integers(0, 4), st.integers(1, AHEAD))
def test_the_least_level_takes_the_least_room(units: list[Units], window: int, ahead: int) -> None:
    def room(level: int) -> int:
        return sum(max(each.count - level, 0) for each in units) + ahead * level

    level = least_level(units, window, ahead)
    assert level >= window
    assert room(level) == min(room(other) for other in range(window, 6))


def test_equal_super_ops_stay_by_equal_parts() -> None:
    """24 layers of 8 units in half of their bytes: of whole layers 14 would come, of parts 13 and a bit."""
    counts = come([Units(8, 1.0)] * 24, 12 * 8)
    assert counts is not None
    assert sum(counts) == 12 * 8 + AHEAD * max(counts) == 106
    assert set(counts) == {4, 5}
    fives = [n for n, count in enumerate(counts) if count == 5]
    assert max(b - a for a, b in pairwise(fives)) <= 3


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=6),
    st.integers(0, 90),
)
def test_what_is_pinned_leaves_the_fewest_bytes(sizes: list[tuple[int, int]], room: int) -> None:
    kinds = [Kind(*size) for size in sizes]
    every = Counter(kinds)
    ways = [
        Counter(kind for kind, kept in zip(kinds, chosen, strict=True) if kept)
        for chosen in product((False, True), repeat=len(kinds))
    ]
    fitting = [way for way in ways if needed(every, way) <= room]
    found = pin(kinds, room)
    if not fitting:
        assert found is None
    else:
        assert found is not None
        assert needed(every, found) <= room
        best = max(sum(kind.nbytes * n for kind, n in way.items()) for way in fitting)
        assert sum(kind.nbytes * n for kind, n in found.items()) == best
    assert needed(every, least(kinds)) <= min(needed(every, way) for way in (Counter(), every))


PIECES = st.lists(
    st.tuples(st.integers(1, 12), st.sampled_from([0.6, 0.8, 1.0])), min_size=1, max_size=6
)
DEVICES = st.sampled_from(
    [
        Device(ram_bandwidth=ram, disk_bandwidth=1.0, pack_bandwidth=2.0, source="measured")
        for ram in (1.0, 3.0, 40.0)
    ]
)


def paged(sizes: list[tuple[int, float]]) -> Load:
    pieces = tuple(
        Piece(f"layer {n}", max(1, round(10 * held * part)), 10 * held)
        for n, (held, part) in enumerate(sizes)
    )
    larger = tuple(replace(piece, held=3 * piece.held) for piece in pieces)
    return Load(larger, FIXED, pieces, unit=10)


def every_whole(load: Load) -> list[TierPlan]:
    """Plans with super-ops pinned whole."""
    plain = TierPlan(load.paged, frozenset(), load.fixed, 0, paged=True)
    names = [piece.name for piece in load.paged]
    return [
        replace(plain, pinned=frozenset(n for n, kept in zip(names, chosen, strict=True) if kept))
        for chosen in product((False, True), repeat=len(names))
    ]


@given(PIECES, st.integers(0, 150))
def test_where_the_disk_binds_no_plan_of_whole_super_ops_reads_less(
    sizes: list[tuple[int, float]], more: int
) -> None:
    """But for rounding: bytes of parts are whole numbers."""
    load = paged(sizes)
    plans = every_whole(load)
    budget = min(plan.peak for plan in plans) + more
    plan = place(load, budget, Device(ram_bandwidth=1e9, disk_bandwidth=1.0, source="measured"))
    assert plan.peak <= budget
    assert all(stays % 10 == 0 for stays in plan.parts.values())
    if plan.paged:
        fitting = [other.moved for other in plans if other.peak <= budget]
        assert plan.moved <= min(fitting) + len(sizes)


@given(PIECES, st.integers(0, 150), DEVICES, st.booleans())
def test_no_plan_that_pins_the_first_or_the_largest_is_faster(
    sizes: list[tuple[int, float]], more: int, device: Device, pages: bool
) -> None:
    load = paged(sizes) if pages else replace(paged(sizes), paged=())
    plain = TierPlan(load.paged or load.pieces, frozenset(), FIXED, 0, paged=pages)
    budget = placing.least_plan(load).peak + more
    plan = place(load, budget, device)
    largest = sorted(plain.streamed, key=lambda piece: -piece.nbytes)
    for order in (plain.streamed, largest):
        for count in range(len(order) + 1):
            other = replace(plain, pinned=frozenset(piece.name for piece in order[:count]))
            if other.peak <= budget and (plan.paged or not pages):
                quick = placing.seconds_of(other, device)
                assert placing.seconds_of(plan, device) <= quick * (1 + 1e-5)


@given(PIECES, st.integers(0, 150), DEVICES)
def test_the_budget_holds_or_the_least_is_told(
    sizes: list[tuple[int, float]], budget: int, device: Device
) -> None:
    load = paged(sizes)
    try:
        assert place(load, budget, device).peak <= budget
    except RecipeError as error:
        told = int(str(error).split("too small: ")[1].split(" are needed")[0].replace(",", ""))
        assert told > budget
        assert place(load, told, device).peak == told


def test_where_experts_are_streamed_too_parts_take_what_their_window_leaves() -> None:
    """Experts need a window of two of theirs; of what every token reads as much comes as must."""
    pieces = list[Piece]()
    for layer in range(4):
        pieces.append(Piece(f"layer {layer}", 20, 20))
        pieces.append(Piece(f"layer {layer} experts", 40, 40, Choice(10, 10)))
    whole = tuple(replace(piece, choice=None, held=3 * piece.held) for piece in pieces)
    load = Load(whole, FIXED, tuple(pieces), unit=10)
    plan = place(load, FIXED.total + 80 + 50)
    assert plan.buffers == 80
    assert sum(plan.stays(piece) for piece in plan.pieces) + plan.room <= 50
    assert {piece.name for piece in plan.routed} == {f"layer {n} experts" for n in range(4)}
    assert sum(map(plan.reads, plan.streamed)) == plan.fetched
    coming = sum(plan.comes(piece) for piece in plan.streamed if piece.choice is None)
    assert coming == 80 - 50 + plan.room


@pytest.mark.parametrize("kind", ["pages", "packed", "experts", "cache"])
def test_many_super_ops_of_all_different_sizes_take_little_work(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eighty layers: some plans a layer, where as many as pairs of sizes were made before."""
    made = 0
    init = TierPlan.__init__

    def counted(*args: object, **given: object) -> None:
        nonlocal made
        made += 1
        init(*args, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(TierPlan, "__init__", counted)
    sizes = [3000 + 17 * n for n in range(80)]
    dense = [Piece(f"layer {n}", size, size + n) for n, size in enumerate(sizes)]
    routed = [
        Piece(f"layer {n} experts", 4 * size, 4 * size, Choice(size, size))
        for n, size in enumerate(sizes)
    ]
    pieces = [piece for pair in zip(dense, routed, strict=True) for piece in pair]
    total = sum(piece.held for piece in dense)
    if kind == "packed":
        plan = place(Load(tuple(dense), FIXED), 125 + total // 2)
    elif kind == "pages":
        plan = place(Load(tuple(dense), FIXED, tuple(dense)), 125 + total // 2)
    elif kind == "experts":
        whole = tuple(replace(piece, choice=None) for piece in pieces)
        plan = place(Load(whole, FIXED, tuple(pieces)), 125 + 2 * total)
    else:
        slots = tuple(
            Slots(n, f"layer {n}", f"layer {n}", size, size // 20, size, 1, size)
            for n, size in enumerate(sizes)
        )
        fixed = replace(FIXED, cache=sum(sizes))
        plan = place(Load(tuple(dense), fixed, tuple(dense), slots=slots), 105 + total // 2)
        assert plan.spill is not None
    assert plan.moved
    assert made <= {"packed": 20, "pages": 20, "experts": 1500, "cache": 2500}[kind]


@given(st.integers(2, 7), st.integers(1, 400), DEVICES)
def test_spills_are_as_fast_as_any_that_may_be_chosen(
    layers: int, less: int, device: Device
) -> None:
    pieces = tuple(Piece(f"layer {n}", 100, 100) for n in range(layers))
    slots = tuple(Slots(n, f"layer {n}", f"layer {n}", 60, 2, 61, 1, 60) for n in range(layers))
    fixed = Fixed(500, layers * 60, 50)
    load = Load(tuple(replace(p, held=300) for p in pieces), fixed, pieces, 10, slots=slots)
    budget = placing.least_plan(load).peak - less
    plans = [
        place(replace(placing.spilling(load, spill), slots=()), budget, device)
        for spill in placing.every_spill(load)
        if placing.least_plan(placing.spilling(load, spill)).peak <= budget
    ]
    if not plans:
        with pytest.raises(RecipeError):
            place(load, budget, device)
    else:
        found = placing.seconds_of(place(load, budget, device), device)
        best = min(placing.seconds_of(plan, device) for plan in plans)
        assert found <= best * (1 + 1e-6)
