"""Slots that lie in a file: steps over stages give what steps over a plain buffer do, wherever pages end."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from einfold.compiler.ir.kv.layout import Buffer, CacheLayout, HeadGroup, LayerCache
from einfold.compiler.ir.kv.spill import STAGES, TAIL, file_bytes, stage_bytes, tail_bytes
from einfold.errors import DiskError
from einfold.runtime.memory.direct import PAGE, aligned
from einfold.runtime.memory.slots_ahead import SlotsAhead
from einfold.runtime.memory.spill_file import SpillFile
from einfold.runtime.memory.spilled import SpilledSlots
from einfold.runtime.memory.spilled_cache import SpilledCache

from ..disks import needs_a_disk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    needs_a_disk(tmp_path)
    return tmp_path


#: Steps of so many tokens each, some of which are forgotten behind it, as padding is.
STEPS = st.lists(st.tuples(st.integers(1, 90), st.integers(0, 80)), min_size=1, max_size=8)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=STEPS,
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    slots=st.integers(50, 400),
    size=st.sampled_from([1, 5, 16, 64]),
    kind=st.sampled_from(["f32", "i8"]),
    by_rows=st.booleans(),
)
def test_steps_see_what_was_written(
    steps: list[tuple[int, int]],
    batch: int,
    heads: int,
    slots: int,
    size: int,
    kind: str,
    by_rows: bool,
    folder: Path,
) -> None:
    """Two buffers in one file, all rows in each step or one row behind the other, pages shared by rows."""
    file, draw = SpillFile(folder), np.random.default_rng(0)
    specs = [Buffer(f"cache.0.{n}.key", (batch, heads, slots, size), kind) for n in range(2)]
    spilled = [SpilledSlots.make(file, spec) for spec in specs]
    plain = [np.zeros(each.shape, each.dtype) for each in spilled]
    lengths = np.zeros(batch, np.int64)
    ahead = SlotsAhead(1)
    parts = [slice(row, row + 1) for row in range(batch)] if by_rows else [slice(None)]
    for tokens, forgotten in steps:
        tokens = min(tokens, slots - int(lengths.max()))
        if tokens < 1:
            break
        for part in parts:
            ahead.step([tuple(each[part] for each in spilled)] if by_rows else [tuple(spilled)])
            with ahead.turn(lengths[part], tokens) as found:
                for each, wanted in zip(found.values(), plain, strict=True):
                    for row, before in enumerate(lengths[part]):
                        known = wanted[part][row, :, :before]
                        assert np.array_equal(each[row, :, :before], known)
                        new = draw.integers(-99, 99, (heads, tokens, size))
                        each[row, :, before : before + tokens] = new
                        wanted[part][row, :, before : before + tokens] = new
        lengths += max(1, tokens - forgotten)
    ahead.close()
    assert file.size == sum(file_bytes([spec]) for spec in specs)
    for spec, each in zip(specs, spilled, strict=True):
        assert each.nbytes == tail_bytes([spec])
        assert each.room <= stage_bytes([spec])


def test_layers_come_in_turn_and_the_next_step_is_read_behind_the_last(folder: Path) -> None:
    file = SpillFile(folder)
    spec = Buffer("cache.0.0.key", (1, 1, 4 * TAIL, 16), "f32")
    layers = [(SpilledSlots.make(file, spec),) for _ in range(3)]
    ahead = SlotsAhead()
    for step in range(2):
        ahead.step(layers)
        for number in range(3):
            with ahead.turn(np.array([step * 2 * TAIL]), 2 * TAIL) as found:
                if step:
                    assert (found["cache.0.0.key"][0, 0, : 2 * TAIL] == number + 1).all()
                found["cache.0.0.key"][0, 0, step * 2 * TAIL :][: 2 * TAIL] = number + 1
    assert ahead.nbytes == STAGES * (4 * TAIL * 64)
    chunk = TAIL * 64
    # Of 2 TAIL slots the newest TAIL stay, of 4 TAIL as many.
    assert ahead.counts.written == 3 * 3 * chunk
    ahead._wait(6)
    ahead._wait(7)
    assert ahead.counts.read == 3 * chunk + STAGES * 3 * chunk
    ahead.close()
    assert ahead.nbytes == 0


def begun(folder: Path) -> tuple[SlotsAhead, list[tuple[SpilledSlots, ...]]]:
    """A layer of two buffers of ones, some of them in the file; one thread, whose next step is to come."""
    file = SpillFile(folder)
    specs = [Buffer(f"cache.0.0.{part}", (1, 1, 4 * TAIL, 16), "f32") for part in ("key", "value")]
    layers = [tuple(SpilledSlots.make(file, spec) for spec in specs)]
    ahead = SlotsAhead(1)
    ahead.step(layers)
    with ahead.turn(np.array([0]), 2 * TAIL) as found:
        for each in found.values():
            each[:] = 1
    return ahead, layers


def check_goes_on(ahead: SlotsAhead, layers: list[tuple[SpilledSlots, ...]]) -> None:
    """Another step sees what was written. It has a thread of its own, lest it wait for ever."""
    seen = list[bool]()

    def step() -> None:
        ahead.step(layers)
        with ahead.turn(np.array([2 * TAIL]), 1) as found:
            seen.extend(bool((each[0, 0, : 2 * TAIL] == 1).all()) for each in found.values())

    thread = threading.Thread(target=step, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert seen == [True, True]
    ahead.close()


def test_an_interrupt_while_what_was_read_is_let_go_is_followed_by_a_whole_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, on, read = threading.Event(), threading.Event(), SpillFile.read

    def slow(*arguments: Any) -> Any:
        reading.set()
        on.wait(20)
        return read(*arguments)

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SpillFile, "read", slow)
    ahead, layers = begun(folder)
    assert reading.wait(20)
    with monkeypatch.context() as patch:
        patch.setattr(ahead._come, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ahead.forget()
    on.set()
    check_goes_on(ahead, layers)


def test_an_interrupt_while_a_step_begins_has_nothing_read_twice(folder: Path) -> None:
    class Interrupted(deque[Any]):
        def __iadd__(self, parts: Any) -> Any:
            self.extend(parts)
            raise KeyboardInterrupt

    ahead, layers = begun(folder)
    ahead.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "_todo", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            ahead.step(layers)
        assert not ahead._todo
    check_goes_on(ahead, layers)


def test_a_cache_that_is_made_takes_the_file_of_none(folder: Path) -> None:
    layout = CacheLayout(tuple(LayerCache(n, 1, 8, 8, (HeadGroup((0,)),)) for n in range(2)))
    cache = SpilledCache(folder, layout, [1])

    def made() -> dict[str, Any]:
        return {spec.name: cache.make(spec) for spec in layout.buffers(1, 100)}

    first, second = made(), made()
    assert isinstance(first["cache.0.0.key"], np.ndarray)
    slots = [each["cache.1.0.key"] for each in (first, second)]
    assert slots[0].file is not slots[1].file
    assert slots[0].file is first["cache.1.0.value"].file
    assert [each.place for each in (first["cache.1.0.key"], first["cache.1.0.value"])] == [0, PAGE]
    cache.close()


def test_what_is_written_is_read_again(folder: Path) -> None:
    """Past the page cache and through it, where the file system has no direct reads."""
    data = np.random.default_rng(0).integers(0, 256, 3 * PAGE, np.uint8)
    for direct in (True, False):
        file, buffer = SpillFile(folder, direct), aligned(3 * PAGE)
        assert file.take(3 * PAGE - 5) == 0
        assert file.take(1) == 3 * PAGE
        buffer[:] = data
        file.write(0, buffer)
        found = file.read(PAGE, PAGE, aligned(PAGE))
        assert np.array_equal(found, data[PAGE : 2 * PAGE])
        with pytest.raises(DiskError, match="ends before the 4,096 bytes at 16,384"):
            file.read(4 * PAGE, PAGE, aligned(PAGE))
        assert [*folder.iterdir()] == []
        file.close()


def test_a_file_system_that_takes_the_flag_and_not_the_write_gives_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, write = SpillFile(folder), os.pwritev
    if not file.direct:
        pytest.skip("there are no direct writes here")
    data, place = aligned(PAGE), file.take(PAGE)
    data[:] = 7

    def picky(*arguments: Any) -> int:
        if file.direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(*arguments)

    monkeypatch.setattr(os, "pwritev", picky)
    file.write(place, data)
    assert not file.direct
    assert (file.read(place, PAGE, aligned(PAGE)) == 7).all()
