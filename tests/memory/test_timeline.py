"""When a plan reads and computes: the order, the room, and the seconds that one number says of it."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from einfold.compiler.ir.device import Device
from einfold.compiler.memory.drawing import WIDTH, timeline_picture
from einfold.compiler.memory.leveling import AHEAD
from einfold.compiler.memory.tiers import Choice, Fixed, Piece, TierPlan, step_of
from einfold.compiler.memory.timeline import Bar, Timeline, timeline_of
from einfold.compiler.report import plan_page

#: A byte a second for the disk, ten for packing, ten for memory.
DEVICE = Device(ram_bandwidth=10, disk_bandwidth=1, pack_bandwidth=10)


def plan(*sizes: int, pinned: tuple[int, ...] = (), paged: bool = True) -> TierPlan:
    pieces = tuple(Piece(f"layer {n}", size, size) for n, size in enumerate(sizes))
    names = frozenset(f"layer {n}" for n in pinned)
    return TierPlan(pieces, names, Fixed(0, 0, 0), 1 << 40, paged=paged)


def lane(bars: tuple[Bar, ...]) -> list[tuple[str, str, float, float]]:
    return [(bar.kind, bar.name, round(bar.start, 6), round(bar.end, 6)) for bar in bars]


def test_where_the_disk_bounds_the_engine_waits_for_each_read() -> None:
    found = timeline_of(plan(10, 10, 10, pinned=(1,)), DEVICE)
    assert found.seconds == pytest.approx(20)
    # The disk is at layer 0 of the next step while layer 2 of this one is computed.
    assert lane(found.disk) == [
        ("read", "layer 0", 0, 9),
        ("read", "layer 2", 9, 19),
        ("read", "layer 0", 19, 20),
    ]
    assert lane(found.engine) == [
        ("wait", "layer 0", 0, 9),
        ("compute", "layer 0", 9, 10),
        ("compute", "layer 1", 10, 11),
        ("wait", "layer 2", 11, 19),
        ("compute", "layer 2", 19, 20),
    ]
    assert (found.spent("read"), found.spent("wait"), found.disk_waits) == (20, 17, 0)


def test_experts_are_read_when_those_before_them_have_run() -> None:
    layer = (Piece("layer", 10, 10), Piece("experts", 20, 20, Choice(10, 10)))
    made = replace(
        plan(), pieces=tuple(replace(p, name=f"{p.name} {n}") for n in (0, 1) for p in layer)
    )
    assert (made.hits, made.reads(made.pieces[1])) == (0.5, 5)
    found = timeline_of(made, DEVICE)
    reads = {bar.name: bar for bar in found.disk if bar.kind == "read"}
    runs = {bar.name: bar for bar in found.engine if bar.kind == "compute"}
    for number in (0, 1):
        assert reads[f"experts {number}"].start == runs[f"layer {number}"].end
        assert runs[f"experts {number}"].start == reads[f"experts {number}"].end
    assert found.seconds == pytest.approx(32)
    assert step_of(made, DEVICE).seconds <= found.seconds


def test_where_packing_bounds_the_disk_waits_for_a_buffer() -> None:
    device = replace(DEVICE, pack_bandwidth=0.5)
    found = timeline_of(plan(10, 10, 10, paged=False), device)
    assert found.seconds == pytest.approx(63)
    assert found.spent("pack") == pytest.approx(60)
    assert found.disk_waits == pytest.approx(33)
    assert found.spent("wait") == 0


def test_what_is_all_pinned_reads_nothing() -> None:
    found = timeline_of(plan(10, 20, pinned=(0, 1)), DEVICE)
    assert found.disk == ()
    assert lane(found.engine) == [("compute", "layer 0", 0, 1), ("compute", "layer 1", 1, 3)]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=7),
    st.sets(st.integers(0, 6)),
    st.booleans(),
    st.sampled_from([0.1, 1.0, 30.0]),
)
def test_no_side_does_two_things_and_no_step_is_faster_than_its_bounds(
    sizes: list[int], pinned: set[int], paged: bool, bandwidth: float
) -> None:
    """And of streamed super-ops no more is there than there is room for."""
    found = plan(*sizes, 5, pinned=tuple(pinned), paged=paged)
    device = replace(DEVICE, disk_bandwidth=bandwidth)
    timeline, step = timeline_of(found, device), step_of(found, device)
    assert timeline.seconds >= step.seconds * (1 - 1e-9)
    assert timeline.spent("read") == pytest.approx(step.disk)
    assert timeline.spent("pack") + timeline.spent("compute") == pytest.approx(
        step.packing + step.compute
    )
    for bars in (timeline.disk, timeline.engine):
        for first, second in pairwise(bars):
            assert first.end == pytest.approx(second.start)
    whole = sum(bar.end - bar.start for bar in timeline.engine)
    assert whole == pytest.approx(timeline.seconds)
    if found.streamed:
        assert timeline.spent("read") + timeline.disk_waits == pytest.approx(timeline.seconds)


def test_what_is_read_ahead_keeps_to_its_room() -> None:
    """A large super-op is read when those before it have made room, so that two of the largest are there."""
    found = timeline_of(plan(1, 1, 1, 1, 8, 8), replace(DEVICE, ram_bandwidth=0.1))
    read = {bar.name: bar for bar in found.disk if bar.kind == "read"}
    ran = {bar.name: bar for bar in found.engine if bar.kind == "compute"}
    assert AHEAD == 2
    assert read["layer 5"].start == pytest.approx(ran["layer 3"].end)


@pytest.mark.parametrize(
    ("beside", "ram", "seconds"), [(1, 10, 40), (1, 5, 44), (2, 5, 40), (None, 1.1, 40), (4, 2, 44)]
)
def test_with_room_for_what_is_read_beside_a_run_the_disk_need_not_wait(
    beside: int | None, ram: float, seconds: float
) -> None:
    """A super-op of ten is read in ten seconds, and another's begins while it computes, for as many bytes as
    there is room for."""
    found = replace(plan(10, 10, 10, 10), beside=beside)
    assert found.buffers == found.ahead == 10 + min(10, 10 if beside is None else beside)
    device = replace(DEVICE, ram_bandwidth=ram)
    timeline = timeline_of(found, device)
    assert timeline.seconds == pytest.approx(seconds)
    assert timeline.disk_waits == pytest.approx(seconds - 40)


def test_a_picture_has_a_box_for_all_that_is_done_and_waited_for() -> None:
    timeline = Timeline(
        4.0,
        (Bar("read", "a<b", 0, 3, 0), Bar("wait", "c", 3, 4, 1)),
        (Bar("wait", "a<b", 0, 1, 0), Bar("pack", "a<b", 1, 2, 0), Bar("compute", "a<b", 2, 4, 0)),
    )
    drawn = timeline_picture(timeline)
    boxes = re.findall(r'x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', drawn)
    assert [(float(x), float(width)) for x, _, width, _ in boxes] == [
        (0, WIDTH * 3 / 4),
        (WIDTH * 3 / 4, WIDTH / 4),
        (0, WIDTH / 4),
        (WIDTH / 4, WIDTH / 4),
        (WIDTH / 2, WIDTH / 2),
    ]
    tops = [float(y) + float(height) for _, y, _, height in boxes]
    assert len(set(tops[:2])) == len(set(tops[2:])) == 1
    assert tops[0] < min(float(y) for _, y, _, _ in boxes[2:])
    assert "a&lt;b is read: 3,000.00 ms from 0.00 on" in drawn
    assert "waits for weights of a&lt;b: 1,000.00 ms" in drawn
    assert "waits for room to read c: 1,000.00 ms from 3,000.00 on" in drawn


def test_a_page_tells_what_is_drawn() -> None:
    found = plan_page("t<o", {"bound by": "a & b"}, timeline_of(plan(10, 10), DEVICE))
    assert "<h1>t&lt;o</h1>" in found
    assert "a &amp; b" in found
    assert (
        "The disk reads 20.000 s and waits 0.00 ms for room; the engine computes 2.000 s" in found
    )
    assert found.count("<svg") == 1
    pinned = plan_page("t", {}, timeline_of(plan(10, pinned=(0,)), DEVICE))
    assert (
        "The disk is not asked; the engine computes 1.000 s, and waits for the disk 0.00 ms"
        in pinned
    )
