"""Reading ahead past the page cache: the bytes are the file's, in order, and what fails is told at once."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from einfold.errors import ArtifactError, DiskError, EinfoldError
from einfold.runtime.memory import read_ahead
from einfold.runtime.memory.direct import PAGE, DirectFile, aligned, direct_hash, room
from einfold.runtime.memory.read_ahead import ReadAhead, Span, located, merged

#: Not a multiple of a page, as files of weights are not.
SIZE = 5 * PAGE + 777

ITEMS = [
    [Span(100, 300), Span(3 * PAGE + 1, 2 * PAGE)],
    [Span(PAGE, PAGE)],
    [Span(5 * PAGE, 777), Span(0, 10)],
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes())
    return path


@contextmanager
def reading(path: Path, direct: bool = True, buffers: int = 2) -> Iterator[ReadAhead]:
    reader = ReadAhead(DirectFile(path, direct), ITEMS, buffers)
    try:
        yield reader
    finally:
        reader.close()
        assert not reader._thread.is_alive()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_rounds_of_reads_give_the_bytes_of_the_file(file: Path, direct: bool, buffers: int) -> None:
    data = file.read_bytes()
    with reading(file, direct, buffers) as reader:
        for index in [0, 1, 2, 0, 1, 2, 0]:
            with reader.item(index) as views:
                for span in ITEMS[index]:
                    found = located(views, reader.spans(index), span.offset, span.length)
                    assert found.tobytes() == data[span.offset : span.offset + span.length]
        assert reader.counts.items >= 7
        wanted = sum(sum(s.length for s in ITEMS[index]) for index in [0, 1, 2, 0, 1, 2, 0])
        assert reader.file.bytes_read >= wanted


def test_a_round_that_was_broken_off_is_passed_over(file: Path) -> None:
    data = file.read_bytes()
    with reading(file) as reader:
        for index in (0, 0, 2, 1):
            with reader.item(index) as views:
                span = ITEMS[index][0]
                found = located(views, reader.spans(index), span.offset, span.length)
                assert found.tobytes() == data[span.offset : span.offset + span.length]


def test_an_interrupt_anywhere_loses_no_buffer(file: Path) -> None:
    """Each line of what the caller does is broken off once, more often than there are buffers."""
    data, span = file.read_bytes(), ITEMS[0][0]

    def take(reader: ReadAhead, index: int) -> bytes:
        with reader.item(index) as views:
            spans = reader.spans(index)
            return located(views, spans, spans[0].offset, spans[0].length).tobytes()

    with reading(file) as reader:
        kept = []
        for line in range(60):
            seen = [0]

            def interrupt(
                frame: Any, event: str, _: object, seen: Any = seen, last: int = line
            ) -> Any:
                if frame.f_code.co_filename == read_ahead.__file__ and event == "line":
                    seen[0] += 1
                    if seen[0] == last:
                        raise KeyboardInterrupt
                return interrupt

            before = sys.gettrace()
            sys.settrace(interrupt)
            try:
                take(reader, line % 2)
            except KeyboardInterrupt as error:
                kept.append(error)  # and with it the frames
            finally:
                sys.settrace(before)
            assert take(reader, 0)[: span.length] == data[span.offset : span.offset + span.length]
            if len(kept) > 20:
                kept.clear()
        assert seen[0] < 60
        assert not reader._asked.qsize() > 2


def test_no_more_is_read_than_there_are_buffers(file: Path) -> None:
    with reading(file) as reader:
        with reader.item(0):
            threading.Event().wait(0.05)
            assert reader.counts.items <= 2
        assert reader.nbytes == 2 * max(
            sum(room(s.offset, s.length) for s in merged(item)) for item in ITEMS
        )


def test_a_file_that_was_cut_short_is_told(file: Path) -> None:
    with reading(file, buffers=1) as reader:
        with reader.item(0):
            os.truncate(file, PAGE + 5)
        for _ in range(2):  # and again, without waiting
            with (
                pytest.raises(ArtifactError, match="cut short after it was opened"),
                reader.item(1),
            ):
                pass


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (OSError(5, "Input/output error"), DiskError, "weights: Input/output error"),
        (ValueError("a bug"), ArtifactError, "the thread that reads .* failed: ValueError: a bug"),
    ],
)
def test_what_the_reader_meets_reaches_the_caller(
    file: Path,
    raised: Exception,
    kind: type[EinfoldError],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> int:
        raise raised

    with reading(file, buffers=1) as reader:
        with reader.item(0):
            monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(kind, match=said), reader.item(1):
            pass


def test_a_reader_that_dies_is_missed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_LOOK", 0.01)
    with reading(file, buffers=1) as reader:
        with reader.item(0):
            monkeypatch.setattr(reader, "_may_read", lambda: False)  # it ends before another item
            reader._give_back(1)
            reader._thread.join(timeout=5)
            monkeypatch.setattr(reader, "_read", 1)
        with pytest.raises(ArtifactError, match="has ended"), reader.item(1):
            pass


def test_hash_without_keeping_the_file(file: Path) -> None:
    assert direct_hash(file) == blake3(file.read_bytes()).hexdigest()


def test_a_place_behind_the_end_is_refused(file: Path) -> None:
    found = DirectFile(file)
    with pytest.raises(ArtifactError, match=f"ends before the {PAGE:,} bytes at {5 * PAGE:,}"):
        found.read(5 * PAGE, PAGE, aligned(PAGE))
    found.close()


def test_spans_within_a_page_are_read_at_once() -> None:
    assert merged([Span(0, 10), Span(20, 10), Span(3 * PAGE, 5)]) == [
        Span(0, 30),
        Span(3 * PAGE, 5),
    ]
