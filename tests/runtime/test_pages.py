"""Pages that are brought and let go: what is resident is counted, what others touched is learned."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from einfold.errors import ArtifactError, DiskError, UnsupportedError
from einfold.runtime.memory import page_ahead
from einfold.runtime.memory.experts import Frequent, Recent, Routed, best
from einfold.runtime.memory.page_ahead import PageAhead
from einfold.runtime.memory.pages import UNIT, PagedFile, no_paging
from einfold.runtime.memory.read_ahead import Span

from ..disks import needs_a_disk

pytestmark = pytest.mark.skipif(bool(no_paging()), reason=no_paging())

ITEMS = [Span(0, 2 * UNIT), Span(2 * UNIT, UNIT), Span(3 * UNIT, 2 * UNIT)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five units, each page of which begins with its number."""
    path = tmp_path_factory.mktemp("pages") / "file"
    needs_a_disk(path.parent)
    pages = np.zeros((5 * UNIT // 4096, 1024), np.int32)
    pages[:, 0] = np.arange(len(pages))
    with path.open("wb") as stream:
        stream.write(pages.tobytes())
        stream.flush()
        os.fsync(stream.fileno())  # pages that are not written yet are not let go
    return path


def resident(path: Path) -> int:
    """Pages of a file in the page cache."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        view = mmap.mmap(stream.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ)
        found = np.zeros(size // 4096, np.uint8)
        place = np.frombuffer(view, np.uint8).ctypes.data
        core = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(place), ctypes.c_size_t(size), ctypes.c_void_p(found.ctypes.data)
        )
    assert core == 0
    return int((found & 1).sum())


@contextmanager
def theirs(path: Path) -> Iterator[np.ndarray[tuple[int, ...], np.dtype[np.int32]]]:
    """The pages as another has them mapped."""
    with path.open("rb") as stream:
        view = mmap.mmap(stream.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    yield np.frombuffer(view, np.int32).reshape(-1, 1024)


def test_what_is_brought_is_resident_and_what_is_let_go_is_not(file: Path) -> None:
    pages = PagedFile(file)
    with theirs(file) as mapped:
        pages.look()
        pages.let_go(0, pages.size)
        assert resident(file) == 0
        pages.bring(1)
        assert resident(file) == UNIT // 4096
        assert pages.bytes_read == UNIT
        assert mapped[600, 0] == 600
        pages.let_go(UNIT, 2 * UNIT)
        assert resident(file) == 0  # their page too: one that is mapped would stay
        assert mapped[600, 0] == 600  # and is read again when it is asked for
    pages.close()


def test_units_that_others_touched_are_found(file: Path) -> None:
    pages = PagedFile(file)
    with theirs(file) as mapped:
        pages.look([(0, pages.size)])
        pages.let_go(0, pages.size)
        for unit in range(5):
            pages.bring(unit)
        assert pages.touched(0, pages.size) == ()
        each = UNIT // 4096
        whole = mapped[each + 300 : 2 * each, 0]  # to the end of its unit, and not into the next
        assert whole.sum() > 0
        assert mapped[4 * each + 9, 0] == 4 * each + 9
        assert pages.touched(0, pages.size) == (1, 4)
        assert pages.touched(2 * UNIT, 4 * UNIT) == ()
        assert pages.is_mapped(UNIT, UNIT)
        assert not pages.is_mapped(4 * UNIT, 2 * UNIT)
    pages.close()


def test_mappings_that_were_there_before_are_let_alone(file: Path) -> None:
    """They may end at any time, and something else may lie at their addresses then."""
    with theirs(file) as before:
        pages = PagedFile(file)
        with theirs(file) as mapped:
            pages.look([(0, pages.size)])
            found = [part.address for part in pages.theirs]
            assert mapped.ctypes.data in found
            assert before.ctypes.data not in found
            assert pages.is_mapped(0, pages.size)
    pages.close()


def test_a_system_that_does_not_say_what_was_touched_is_told(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(PagedFile, "_pagemap", none)
    with pytest.raises(UnsupportedError, match="does not bring pages of"):
        PagedFile(file)


@contextmanager
def walking(path: Path, window: int) -> Iterator[tuple[PagedFile, PageAhead]]:
    pages = PagedFile(path)
    pages.let_go(0, pages.size)
    ahead = PageAhead(pages, ITEMS, (window, window))
    try:
        yield pages, ahead
    finally:
        ahead.close()


def until(true: Callable[[], bool]) -> None:
    for _ in range(400):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not become true")


def test_items_are_there_in_their_turn_and_the_window_holds(file: Path) -> None:
    with walking(file, 3 * UNIT) as (pages, ahead), theirs(file) as mapped:
        pages.look([(0, pages.size)])
        for _ in range(3):
            for index, span in enumerate(ITEMS):
                with ahead.item(index):
                    assert ahead.units <= 3
                    assert span.length <= resident(file) * 4096 <= 3 * UNIT
                    first, last = span.offset // 4096, (span.offset + span.length) // 4096
                    assert mapped[first:last, 0].tolist() == list(range(first, last))
        until(lambda: ahead.units == 3)
        assert pages.bytes_read <= 3 * 5 * UNIT + 3 * UNIT
        assert ahead.counts.items >= 9


def test_an_item_begins_to_come_where_there_is_room_for_a_part_of_it(file: Path) -> None:
    """And the rest of it once what ran is let go; what the caller waits for comes whatever room there is."""
    with walking(file, 2 * UNIT) as (pages, ahead):
        pages.look()
        with ahead.item(0):
            assert ahead.units == 2
        with ahead.item(1):
            until(lambda: ahead._begun[2].there == {3})
            assert (ahead._begun[2].units, ahead.units) == ({3, 4}, 2)
        with ahead.item(2):
            assert ahead._begun[2].there == {3, 4}
    with walking(file, UNIT) as (pages, ahead):
        for index in range(len(ITEMS)):
            with ahead.item(index):
                assert not ahead._begun[index].left


def test_what_nobody_touches_is_not_brought_again(file: Path) -> None:
    with walking(file, 3 * UNIT) as (pages, ahead):
        for _ in range(3):
            for index in range(len(ITEMS)):
                with ahead.item(index):
                    pass
        assert pages.bytes_read <= 5 * UNIT + 3 * UNIT


def test_a_kind_of_step_brings_what_it_touched_before(file: Path) -> None:
    with walking(file, 5 * UNIT) as (pages, ahead), theirs(file) as mapped:
        pages.look([(0, pages.size)])
        ahead.kind = "few"
        read = []
        for _ in range(3):
            for index, span in enumerate(ITEMS):
                with ahead.item(index):
                    first = span.offset // 4096
                    assert mapped[first + 3, 0] == first + 3  # of each item the first unit
            until(lambda: ahead.units == 3 and not any(b.left for b in ahead._begun.values()))
            read.append(pages.bytes_read)
        assert read[2] - read[1] == 3 * UNIT
        assert read[0] > 5 * UNIT


def test_what_a_run_found_missing_and_read_itself_comes_from_then_on(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a few pages behind the edge of a unit were taken for mapped beside a fault before it."""
    with walking(file, 2 * UNIT) as (pages, ahead), theirs(file) as mapped:
        pages.look([(0, pages.size)])
        until(lambda: ahead.units == 2 and not ahead._begun[0].left)
        brought, bring = [0, 1], pages.bring
        monkeypatch.setattr(pages, "bring", lambda unit: (brought.append(unit), bring(unit)))
        ahead._learned[None, 0] = (0,)
        for units in ({0, 1}, {0}, {0, 1}):
            for index in range(len(ITEMS)):
                with ahead.item(index):
                    if not index:
                        assert ahead._begun[ahead._done].units == units
                        assert mapped[: UNIT // 4096 + 2, 0].sum() > 0
        until(lambda: ahead.units == 2 and not any(b.left for b in ahead._begun.values()))
        assert pages.bytes_read // UNIT == len(brought) + 1
        assert ahead._learned[None, 0] == (0, 1)


def test_what_is_not_likely_to_be_read_comes_where_it_was(file: Path) -> None:
    pages = PagedFile(file)
    pages.let_go(0, pages.size)
    ahead = PageAhead(pages, ITEMS, (2 * UNIT, 2 * UNIT), first=[UNIT, UNIT, 9])
    each = UNIT // 4096
    with theirs(file) as mapped:
        pages.look([(0, pages.size)])
        for units in ([{0}, {2}, {3}], [{0}, {2}, {3, 4}]):
            for index, (first, last) in enumerate(((0, 1), (2, 3), (3, 5))):
                with ahead.item(index):
                    assert ahead._begun[ahead._done].units == units[index]
                    assert mapped[first * each : last * each, 0].sum() > 0
    ahead.close()


def test_a_thread_that_reads_and_dies_is_missed(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ended it, the caller that waits for a unit is told, and does not hang."""
    monkeypatch.setattr(page_ahead, "_LOOK", 0.01)
    with walking(file, 2 * UNIT) as (_, ahead):
        with ahead.item(0):
            until(lambda: ahead.units == 2)  # there is no room for more: the threads wait
            monkeypatch.setattr(ahead, "_take", lambda: None)
            dying = ahead._threads[0]

        def again() -> None:
            for index in (1, 2, 0):
                with ahead.item(index):
                    pass

        with pytest.raises(ArtifactError, match=r"have ended; load the artifact again"):
            again()
        until(lambda: not dying.is_alive())


def test_units_that_were_read_are_told_and_not_those_in_memory_for_others(file: Path) -> None:
    pages = PagedFile(file)
    pages.let_go(0, pages.size)
    with theirs(file) as found:
        pages.look([(0, pages.size)])
        pages.bring(3)
        with file.open("rb") as stream:  # as another process
            stream.read()
        assert pages.mapped(range(5)) == ()
        each = UNIT // 4096
        assert found[4 * each, 0] == found[4 * each, 0]
        assert pages.mapped(range(5)) in (
            (4,),
            (3, 4),
        )  # what is there beside a fault is mapped too
    pages.let_go(0, pages.size)
    pages.close()


def test_of_routed_items_what_the_policy_takes_for_likely_stays(file: Path) -> None:
    """Of experts that tokens choose the missing ones are brought, and the rest is held within the room."""
    pages = PagedFile(file)
    pages.let_go(0, pages.size)
    routed = {0: Routed((), {0: (0,), 1: (1,)}, 1, 0), 2: Routed((), {0: (3,), 1: (4,)}, 1, 1)}
    ahead = PageAhead(pages, ITEMS, (4 * UNIT, 2 * UNIT), routed, policy=Recent)
    each, read = UNIT // 4096, []
    with theirs(file) as mapped:
        pages.look([(0, pages.size)])

        def take(tokens: int, *chosen: list[int]) -> None:
            ahead.step(tokens > 1, tokens)
            for index in range(len(ITEMS)):
                index_TJ = np.array(chosen[index // 2])[:, None] if index != 1 else None
                with ahead.item(index, index_TJ):
                    units = (
                        [2]
                        if index_TJ is None
                        else [(index // 2 * 3) + e for e in set(index_TJ[:, 0])]
                    )
                    assert all(mapped[unit * each + 3, 0] == unit * each + 3 for unit in units)
                    assert ahead.units + ahead.staying <= 4
                    assert resident(file) <= 4 * each
            read.append(pages.bytes_read // UNIT)

        take(2, [0, 1], [0, 1])
        assert ahead.staying == 0  # a prompt's window is all the room
        for expert in (0, 0, 1, 0, 1):
            take(1, [expert], [0])
            assert ahead.staying <= 2
        assert ahead.counts.asked == 10
        # Of item 2 one expert stays, and of item 0 the other unit is that of the last token.
        assert ahead._stay == {1, 3}
        assert ahead.counts.held == 1 + 4
        take(1, [1], [0])
        assert ahead.counts.held == 7
        assert read[-1] - read[-2] <= 1  # the item between
        take(2, [0, 1], [0, 1])
        assert ahead.staying == 0
    ahead.close()


class Counted:
    """In place of a file: what is there is a set, and no more than `room` units of it may be."""

    path, bytes_read, size = Path("counted"), 0, 40 * UNIT

    def __init__(self, room: int) -> None:
        self.room, self.there = room, set[int]()
        self._lock = threading.Lock()

    def bring(self, unit: int) -> None:
        with self._lock:
            assert unit not in self.there
            self.there.add(unit)
            assert len(self.there) <= self.room

    def let_go(self, start: int, end: int) -> None:
        with self._lock:
            self.there -= {*range(start // UNIT, end // UNIT)}

    def mapped(self, units: list[int]) -> tuple[int, ...]:
        return tuple(unit for unit in units if unit in self.there)

    def unmap(self, start: int, end: int) -> None: ...

    def touched(self, start: int, end: int) -> tuple[int, ...]:
        return tuple(range(start // UNIT, end // UNIT))

    def close(self) -> None: ...


@pytest.mark.parametrize("room", [0, 3, 9])
def test_the_room_holds_whatever_is_chosen(room: int) -> None:
    """Two layers of a dense item and two items of four experts, of two units each that they share in part;
    steps of one token and of many, and rounds that are broken off."""
    spans, routed, at = list[Span](), dict[int, Routed](), 0
    for layer in range(2):
        spans.append(Span(at * UNIT, 2 * UNIT))
        at += 2
        for half in range(2):
            experts = {4 * half + n: (at + n, at + n + 1) for n in range(4)}
            routed[len(spans)] = Routed((at + 5,), experts, 2, layer)
            spans.append(Span(at * UNIT, 6 * UNIT))
            at += 6
    file: Any = Counted(12 + room)
    ahead = PageAhead(file, spans, (12 * UNIT, 9 * UNIT), routed, room * UNIT)
    draws = np.random.default_rng(room)
    for _ in range(60):
        tokens = int(draws.choice([1, 1, 1, 1, 2, 9]))
        ahead.step(tokens > 1, tokens)
        chosen = [draws.permuted(np.tile(np.arange(8), (tokens, 1)), axis=1)[:, :2] for _ in spans]
        for index in range(len(spans) - int(draws.choice([0, 0, 0, 3]))):
            index_TJ = chosen[routed[index].layer] if index in routed else None
            with ahead.item(index, index_TJ):
                want = {*range(2 * 14)} if index_TJ is None else routed[index].asked(index_TJ)
                first = spans[index].offset // UNIT
                whole = {*range(first, first + spans[index].length // UNIT)}
                assert want & whole <= file.there
                assert ahead.units + ahead.staying <= file.room
    assert ahead.counts.held > 0 or not room
    ahead.close()


@pytest.mark.parametrize("policy", [Recent, Frequent])
def test_policies_hold_what_was_asked_for_last_or_most(
    policy: type[Recent] | type[Frequent],
) -> None:
    found, routed = policy(6), Routed((5,), {0: (0, 1), 1: (2,), 2: (3, 4)}, 1, 0)
    for expert in (0, 0, 0, 2, 1):
        found.step(1)
        found.chose(routed, np.array([[expert]]))
    most = {Recent: [5, 2, 3], Frequent: [5, 0, 1]}[policy]
    assert best(range(6), found.scores, 3) == set(most)
    # A prompt counts as its tokens would have, one behind the other.
    whole, index_TJ = policy(6), np.array([[0], [0], [0], [2], [1]])
    whole.step(5)
    whole.chose(routed, index_TJ)
    if policy is Frequent:
        assert whole.scores == pytest.approx(found.scores)
    assert best(range(6), whole.scores, 2) <= {5, most[1], 3}
    assert routed.most == 3
    assert routed.asked(index_TJ[:4]) == {0, 1, 3, 4, 5}


def test_a_round_that_was_broken_off_is_let_go(file: Path) -> None:
    with walking(file, 3 * UNIT) as (_, ahead):
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt), ahead.item(0):
                raise KeyboardInterrupt
        with ahead.item(1):
            assert ahead.units <= 3
        with ahead.item(2):
            assert resident(file) * 4096 <= 3 * UNIT


def test_a_unit_that_cannot_be_read_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = PagedFile(file)

    def fail(*_: object) -> None:
        raise OSError(14, "Bad address")  # what the kernel says of a page that it cannot read

    monkeypatch.setattr(pages, "_advise", fail)
    with pytest.raises(DiskError, match="Input/output error"):
        pages.bring(0)
    ahead = PageAhead(pages, ITEMS, (5 * UNIT, 5 * UNIT))
    for _ in range(2):
        with pytest.raises(DiskError, match="Input/output error"), ahead.item(0):
            pass
    ahead.close()
    with pytest.raises((DiskError, ArtifactError)), ahead.item(0):
        pass


def test_a_file_that_was_cut_short_is_told(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(file.read_bytes())
    pages = PagedFile(path)
    os.truncate(path, UNIT)
    with pytest.raises(ArtifactError, match="was changed after it was opened"):
        pages.bring(3)
    pages.close()


def test_a_system_that_does_not_bring_pages_is_told(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(PagedFile, "_advise", fail)
    with pytest.raises(UnsupportedError, match="does not bring pages of"):
        PagedFile(file)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "x", "5.4.0-150", "", "")))
    assert "from 5.14 on" in no_paging()


def test_an_item_that_is_passed_over_is_not_begun_meanwhile(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Letting go takes a while, in which a thread could take up what is passed over."""
    with walking(file, 2 * UNIT) as (pages, ahead):
        bring, let_go = pages.bring, pages.let_go
        monkeypatch.setattr(pages, "bring", lambda unit: (time.sleep(0.04), bring(unit)))
        monkeypatch.setattr(pages, "let_go", lambda *span: (time.sleep(0.02), let_go(*span)))
        for index in (2, 2, 1, 0, 2, 1):
            with ahead.item(index):
                assert ahead.units <= 2
        assert not ahead._unread
