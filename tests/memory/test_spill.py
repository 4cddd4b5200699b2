"""Which layers of a cache are spilled: the budget holds, as few bytes as it takes, spread evenly."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from einfold.compiler.ir.device import Device
from einfold.compiler.memory.placing import place
from einfold.compiler.memory.spill import Slots, Spill, spills
from einfold.compiler.memory.tiers import Fixed, Load, Piece, step_of
from einfold.compiler.memory.timeline import timeline_of
from einfold.errors import RecipeError

#: Of a layer's slots the bytes of all, of the tail, of a stage, of a token and of the file.
SIZES = 1000, 10, 1004, 1, 1002


def load(layers: int, weights: int = 100, sizes: tuple[int, ...] = SIZES) -> Load:
    """So many layers whose caches are ten times their weights."""
    names = [f"layer {index}" for index in range(layers)]
    pieces = tuple(Piece(name, weights, weights) for name in names)
    slots = tuple(Slots(i, name, name, *sizes) for i, name in enumerate(names))
    return Load(pieces, Fixed(500, layers * sizes[0], 50), slots=slots)


def test_nothing_is_spilled_where_weights_can_be_streamed_instead() -> None:
    found = load(8)
    assert place(found, 550 + 8000 + 800 + 200).spill is None
    least = 550 + 8000 + 2 * 100 + 2 * 100
    assert place(found, least).spill is None
    spilled = place(found, least - 1).spill
    assert spilled is not None
    # Two stages are more than one layer, and the tails of three; what is left pins weights.
    assert len(spilled.layers) == 3


@pytest.mark.parametrize(
    ("less", "layers"), [(0, (1, 4, 7)), (900, (1, 4, 7)), (2900, (0, 2, 3, 5, 7))]
)
def test_layers_are_spread_and_no_more_than_need_be(less: int, layers: tuple[int, ...]) -> None:
    plan = place(load(8), 550 + 8000 + 399 - less)
    assert plan.spill is not None
    assert plan.spill.layers == layers
    assert plan.cache == 8000
    assert plan.fixed.cache == 8000 - len(layers) * 990 + 2 * 1004
    assert plan.peak <= plan.budget


@given(st.integers(1, 9), st.integers(0, 9000))
def test_the_budget_holds_or_the_least_is_told(layers: int, budget: int) -> None:
    found = load(layers)
    try:
        plan = place(found, budget)
    except RecipeError as error:
        least = int(str(error).split("too small: ")[1].split(" are needed")[0].replace(",", ""))
        assert budget < least
        plan = place(found, least)
        assert plan.peak == least
    assert plan.peak <= max(plan.budget, budget)
    if plan.spill is not None:
        assert plan.moved == plan.fetched + plan.spill.nbytes + len(plan.spill.layers)


def test_slots_that_are_larger_may_stay_where_smaller_ones_are_spilled() -> None:
    small = load(6)
    large = Slots(6, "layer 6", "layer 6", 3000, 10, 3004, 3, 3002)
    mixed = replace(small, slots=(*small.slots, large), fixed=Fixed(500, 9000, 50))
    smaller, both = spills(mixed.slots)
    assert all(large not in spill.slots for spill in smaller)
    assert [len(spill.layers) for spill in smaller] == [
        3,
        4,
        5,
        6,
    ]  # fewer free less than stages take
    assert [len(spill.layers) for spill in both] == [5, 6, 7]
    assert {spill.stages for spill in both} == {2 * 3004}


def test_one_layer_alone_has_one_stage_and_frees_nothing() -> None:
    one = load(1).slots
    assert Spill(one).stages == 1004
    assert [*spills(one)] == [[]]


def test_of_many_layers_few_more_are_spilled_than_must_be() -> None:
    found = load(80, weights=40)
    budget = 550 + 80 * 40 + 40000
    plan = place(found, budget)
    assert plan.spill is not None
    assert plan.peak <= budget
    streaming = 2 * 40 + 2 * 40  # what is read ahead, and two packed super-ops
    fitting = [
        len(spill.layers)
        for series in spills(found.slots)
        for spill in series
        if 550 + 80000 - spill.freed() + streaming <= budget
    ]
    assert min(fitting) <= len(plan.spill.layers) < min(fitting) + 4


def test_why_nothing_is_spilled_is_told() -> None:
    found = replace(load(8), slots=(), unspilled="it is on tmpfs")
    with pytest.raises(RecipeError, match=r"\(the cache cannot be spilled: it is on tmpfs\)$"):
        place(found, 4000)
    with pytest.raises(RecipeError, match=r"the cache 2,088 \(of 8,000, the rest spilled\)"):
        place(load(8), 2000)


def test_no_more_is_spilled_than_the_disk_has_room_for() -> None:
    budget = 550 + 8000 + 399 - 900
    three = replace(load(8), disk=3 * 1002)
    plan = place(three, budget)
    assert plan.spill is not None
    assert plan.spill.layers == (1, 4, 7)
    assert plan.spill.file == 3 * 1002
    with pytest.raises(RecipeError, match=r"not all of the cache can be spilled: .* 3,006 free"):
        place(three, budget - 1000)
    with pytest.raises(RecipeError, match="it takes 8,016 bytes on the disk"):
        place(replace(three, disk=3005), budget)


def test_a_step_reads_what_is_spilled_while_other_layers_run() -> None:
    plan = place(load(8), 550 + 8000 + 399 - 900)
    assert plan.spill is not None
    device = Device(ram_bandwidth=1000.0, disk_bandwidth=1000.0, pack_bandwidth=1e9)
    step = step_of(plan, device)
    assert step.disk == plan.moved / 1000
    assert step.compute == (8 * 100 + 8000) / 1000
    slow = timeline_of(plan, device)
    names = {bar.name for bar in slow.disk if bar.kind == "read"}
    assert {f"cache of layer {layer}" for layer in plan.spill.layers} <= names
    assert slow.spent("read") == pytest.approx(step.disk)
    assert step.seconds <= slow.seconds <= step.disk + step.compute


def test_a_turn_of_several_super_ops_holds_its_stage_until_the_last() -> None:
    """A layer whose slots others read: nothing is read into its stage before these have run."""
    names = [f"layer {index}" for index in range(4)]
    pieces = tuple(Piece(name, 1, 1) for name in names)
    slots = Slots(0, "layer 0", "layer 2", 1000, 0, 1000, 0, 1000)
    fixed = Fixed(0, 1000, 0)
    plan = replace(place(Load(pieces, fixed), 1 << 20), spill=Spill((slots,)))
    device = Device(ram_bandwidth=1000.0, disk_bandwidth=1000.0, pack_bandwidth=1e9)
    found = timeline_of(plan, device)
    read = [bar for bar in found.disk if bar.kind == "read"]
    assert found.spent("read") == pytest.approx(1.0)
    ends = {bar.name: bar.end for bar in found.engine if bar.kind == "compute"}
    assert max(bar.start for bar in read) >= ends["layer 2"] - 1e-9
