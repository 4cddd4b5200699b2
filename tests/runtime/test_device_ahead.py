"""What is copied to a device ahead of its readers: the right weights in every order of the two streams."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from einfold.compiler.ir.weights import Weight
from einfold.errors import ArtifactError, OutOfMemoryError
from einfold.runtime.memory.device_ahead import Block, DeviceAhead

from ..simulated_copies import ORDERS, Forgetful, Interrupted, RaceError, Simulated


def blocks(sizes: Sequence[int]) -> list[Block]:
    """Items of two weights each, of two types, which differ from item to item."""
    return [
        Block(
            {
                "w": Weight.of(torch.arange(size * 3).reshape(size, 3).float() + 1000 * n),
                "codes": Weight.of(torch.arange(size + n, dtype=torch.uint8)),
            }
        )
        for n, size in enumerate(sizes)
    ]


def sums(weights: dict[str, Tensor]) -> float:
    return float(weights["w"].sum() + weights["codes"].sum())


def run(ahead: DeviceAhead, items: Sequence[int]) -> list[float]:
    found = []
    for index in items:
        with ahead.item(index) as weights:
            found.append(sums(weights))
    return found


def broken(ahead: DeviceAhead, index: int) -> None:
    with ahead.item(index) as weights:
        sums(weights)
        raise KeyboardInterrupt


def wanted(made: Sequence[Block]) -> list[float]:
    return [sums({name: w.load() for name, w in block.weights.items()}) for block in made]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4), st.data())
def test_items_are_there_when_they_are_read(
    sizes: list[int], buffers: int, data: st.DataObject
) -> None:
    """Rounds that are broken off anywhere among them, so that an item lies in another buffer each time."""
    made = blocks(sizes)
    expected, copies = wanted(made), Simulated()
    ahead = DeviceAhead(made, copies, buffers)
    with copies:
        for _ in range(data.draw(st.integers(1, 5))):
            until = data.draw(st.integers(1, len(made)))
            assert run(ahead, range(until)) == expected[:until]
        assert run(ahead, range(len(made))) == expected


def test_copies_are_asked_for_ahead_and_once_a_round() -> None:
    made, copies = blocks([4, 2, 8, 1, 5]), Simulated()
    ahead = DeviceAhead(made, copies, 2)
    with copies:
        with ahead.item(0) as weights:
            assert copies.copies == 2, "that of the next item is under way while this one is read"
            sums(weights)
        run(ahead, range(1, 5))
        assert copies.copies == 5 + 2, "of the next round two are under way"
        for _ in range(3):
            run(ahead, range(5))
    assert copies.copies == 4 * 5 + 2
    whole = sum(block.nbytes for block in made)
    assert ahead.copied == 4 * whole + made[0].nbytes + made[1].nbytes


@pytest.mark.parametrize("forgets", ORDERS)
def test_an_order_that_is_left_out_is_seen(forgets: str) -> None:
    copies = Forgetful(forgets)
    ahead = DeviceAhead(blocks([4, 2, 8]), copies, 2)
    with copies, pytest.raises(RaceError):
        run(ahead, [0, 1, 2, 0])


def test_copies_that_nothing_waits_for_give_other_numbers() -> None:
    """Where reads are not watched, as those of a kernel are not, the numbers tell."""
    made, copies = blocks([4, 2, 8]), Forgetful("compute_behind")
    found = run(DeviceAhead(made, copies, 2), range(3))
    assert all(one != right for one, right in zip(found, wanted(made), strict=True))


def test_a_view_that_is_read_too_late_is_seen() -> None:
    copies = Simulated()
    ahead = DeviceAhead(blocks([4, 2, 8]), copies, 2)
    with copies:
        with ahead.item(0) as weights:
            late = weights["w"][1:]
        with pytest.raises(RaceError, match="did not wait for the copy"):
            late.sum()


def test_a_step_that_fails_leaves_the_next_one_right() -> None:
    made, copies = blocks([4, 2, 8, 3]), Simulated()
    ahead = DeviceAhead(made, copies, 2)
    with copies:
        for fails in range(4):
            run(ahead, range(fails))
            with pytest.raises(KeyboardInterrupt):
                broken(ahead, fails)
            assert run(ahead, range(4)) == wanted(made)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("rounds", [0, 1])
def test_an_interrupt_anywhere_leaves_the_next_step_right(behind: bool, rounds: int) -> None:
    """Before and behind everything that is asked of the device, in the first step and in a later one."""
    made, calls, armed = blocks([4, 2, 8]), 0, False
    while not armed:
        copies = Interrupted(behind)
        ahead = DeviceAhead(made, copies, 2)
        with copies:
            for _ in range(rounds):
                run(ahead, range(3))
            copies.arm(calls)
            with suppress(KeyboardInterrupt):
                run(ahead, range(3))
            armed = copies.armed  # all calls of a step were interrupted before
            copies.arm(-1)
            for _ in range(2):
                assert run(ahead, range(3)) == wanted(made)
        calls += 1
    assert calls > 12


def test_a_device_without_room_for_the_ring_is_told_before_anything_is_loaded() -> None:
    made = [Block({"w": Weight.absent([64], torch.float32, "w")})] * 3
    with pytest.raises(OutOfMemoryError, match="no room for 2 buffers of 256 bytes"):
        DeviceAhead(made, Simulated(room=511), 2)


def test_memory_that_is_not_locked_is_told_and_copied() -> None:
    made, copies = blocks([4, 2, 8]), Simulated(unlocked="out of memory")
    ahead = DeviceAhead(made, copies, 2)
    assert ahead.unlocked == "out of memory" and not DeviceAhead(made, Simulated(), 2).unlocked
    with copies:
        assert run(ahead, range(3)) == wanted(made)


def test_what_is_closed_gives_nothing() -> None:
    copies = Simulated()
    ahead = DeviceAhead(blocks([4, 2]), copies, 2)
    with copies:
        run(ahead, [0])
    ahead.close()
    ahead.close()
    assert copies.closed
    with pytest.raises(ArtifactError, match="was closed"), ahead.item(1):
        pass
