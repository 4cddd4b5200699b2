"""Packing of buffers: the check beside every byte, the bound, what first fit misses, capacities."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from einfold.compiler.memory.buffers import Buffer, arena_bytes, fault, peak_bytes
from einfold.compiler.memory.first_fit import first_fits
from einfold.compiler.memory.packing import pack


def table(text: str) -> list[Buffer]:
    """Buffers as `start-end:size`."""
    found = []
    for entry in text.split():
        times, size = entry.split(":")
        start, end = times.split("-")
        found.append(Buffer(int(start), int(end), int(size)))
    return found


BUFFERS = st.lists(
    st.builds(
        lambda start, steps, size: Buffer(start, start + steps, size),
        st.integers(0, 8),
        st.integers(1, 5),
        st.integers(0, 6),
    ),
    max_size=9,
)


@pytest.mark.parametrize(
    ("buffers", "offsets", "capacity", "said"),
    [
        ("0-2:4 2-4:4", [0, 0], 4, ""),  # one ends where the other begins
        ("0-3:4 2-4:4", [0, 4], 8, ""),
        ("0-3:4 2-4:4", [0, 3], 8, "buffers 0 and 1 lie over each other"),
        ("0-3:1 0-3:1 1-2:9", [0, 8, 0], 9, "buffers 0 and 2 lie over each other"),
        ("0-3:4 2-4:4", [0, 4], 7, "buffer 1 at 4 leaves an arena of 7 bytes"),
        ("0-3:4", [-1], 4, "buffer 0 at -1 leaves an arena of 4 bytes"),
        ("0-3:4", [], 4, "1 buffers have 0 places"),
        ("0-3:4 0-3:0", [0, 2], 4, ""),  # what is nothing meets nothing
    ],
)
def test_faults_are_found(buffers: str, offsets: list[int], capacity: int, said: str) -> None:
    assert fault(table(buffers), offsets, capacity) == said


@given(BUFFERS, st.data())
def test_the_check_is_that_of_every_byte(buffers: list[Buffer], data: st.DataObject) -> None:
    offsets = [data.draw(st.integers(0, 12)) for _ in buffers]
    cells = [
        (step, byte)
        for buffer, offset in zip(buffers, offsets, strict=True)
        for step in range(buffer.start, buffer.end)
        for byte in range(offset, offset + buffer.size)
    ]
    said = fault(buffers, offsets, arena_bytes(buffers, offsets))
    assert bool(said) == (len(set(cells)) < len(cells))


@given(BUFFERS)
def test_the_peak_is_that_of_every_step(buffers: list[Buffer]) -> None:
    live = [sum(b.size for b in buffers if b.start <= step < b.end) for step in range(14)]
    assert peak_bytes(buffers) == max(live)


@settings(max_examples=60, deadline=None)
@given(BUFFERS)
def test_plans_hold_and_none_is_below_the_bound(buffers: list[Buffer]) -> None:
    plan = pack(buffers, seconds=0.5)
    assert not fault(buffers, plan.offsets, plan.arena)
    assert plan.arena >= plan.bound == peak_bytes(buffers)
    assert plan.optimal  # such small ones are always searched to the end


#: First fit misses the bound of 9 in every order.
TIGHT = "1-5:3 4-8:3 4-5:3 0-3:4 5-8:4"


def test_the_search_finds_what_first_fit_misses() -> None:
    buffers = table(TIGHT)
    assert min(arena_bytes(buffers, found) for found in first_fits(buffers)) > 9
    plan = pack(buffers)
    assert (plan.arena, plan.bound, plan.optimal) == (9, 9, True)


def test_a_capacity_ends_the_search() -> None:
    first = min(arena_bytes(table(TIGHT), found) for found in first_fits(table(TIGHT)))
    assert pack(table(TIGHT), capacity=first).arena == first
    assert pack(table(TIGHT), capacity=9).arena == 9
    assert pack(table(TIGHT), capacity=5).arena == 9  # below the bound: as small as can be


def test_without_time_first_fit_stands() -> None:
    plan = pack(table(TIGHT), seconds=0)
    assert plan.arena > plan.bound and not plan.optimal


def test_nothing_takes_nothing() -> None:
    assert pack([]).arena == 0
    assert pack(table("0-1:0 3-5:0")).arena == 0


@pytest.mark.parametrize("buffer", ["2-2:8", "3-2:8", "0-1:-1"])
def test_what_is_no_buffer_is_refused(buffer: str) -> None:
    with pytest.raises(ValueError, match="is none"):
        table(buffer)
