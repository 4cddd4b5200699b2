"""A thread that reads what comes next, round after round, into a few buffers.

    reader   | read 3 | read 5 | read 6 |  wait  | read 3 | ..
    caller            | with 3 .. | with 5 .. | with 6 .. | with 3 ..

What is read and in which order is known beforehand and never changes: a step reads every weight once. The
caller takes each item in that order, uses it, and so gives its buffer back to be read into.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ...errors import ArtifactError, EinfoldError, recognise
from .direct import PAGE, Bytes, DirectFile, aligned, room

#: Seconds after which a caller looks whether the reader is still there.
_LOOK = 0.5


@dataclass(frozen=True)
class Span:
    """A stretch of the file."""

    offset: int
    length: int


@dataclass
class Counts:
    """What was read so far, and how long each side waited for the other."""

    items: int = 0
    read_seconds: float = 0.0
    waited_seconds: float = 0.0


class _StopError(Exception):
    """The reader is asked to end."""


class ReadAhead:
    """Reads items, lists of spans, round after round. Make it in a `with`, or `close` it."""

    def __init__(self, file: DirectFile, items: Sequence[Sequence[Span]], buffers: int) -> None:
        self.file = file
        self.counts = Counts()
        self._items = [merged(spans) for spans in items]
        self._size = max(item_room(spans) for spans in self._items)
        self._free: queue.SimpleQueue[Bytes | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[int, Bytes, list[Bytes]] | BaseException] = (
            queue.SimpleQueue()
        )
        self._next = 0
        self._failed: BaseException | None = None
        self.nbytes = buffers * self._size
        for _ in range(buffers):
            self._free.put(aligned(self._size))
        self._thread = threading.Thread(target=self._run, name="einfold-read-ahead", daemon=True)
        self._thread.start()

    @contextmanager
    def item(self, index: int) -> Iterator[list[Bytes]]:
        """The bytes of an item's spans (those that touch are one), until the `with` ends.

        Items come in order, round after round; those of a round that was broken off are passed over. Raises
        what the reader met, in this thread.
        """
        started = time.perf_counter()
        while self._next != index:
            self._free.put(self._take()[0])
            self._next = (self._next + 1) % len(self._items)
        buffer, views = self._take()
        self.counts.waited_seconds += time.perf_counter() - started
        self._next = (index + 1) % len(self._items)
        try:
            yield views
        finally:
            views.clear()
            self._free.put(buffer)

    def spans(self, index: int) -> list[Span]:
        """The spans of an item as they are given."""
        return self._items[index]

    def close(self) -> None:
        """Ends the thread and lets the buffers go."""
        self._free.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)
        self.file.close()

    def _take(self) -> tuple[Bytes, list[Bytes]]:
        while self._failed is None:
            try:
                found = self._full.get(timeout=_LOOK)
            except queue.Empty:
                if self._thread.is_alive():
                    continue
                found = ArtifactError(
                    f"the thread that reads {self.file.path} has ended; load the artifact again"
                )
            if isinstance(found, BaseException):
                self._failed = found
                break
            return found[1], found[2]
        assert self._failed is not None
        raise self._failed

    def _run(self) -> None:
        try:
            while True:
                for index in range(len(self._items)):
                    self._read(index)
        except _StopError:
            return
        except BaseException as error:  # the caller must hear of it: it waits
            self._full.put(recognise(error) or self._renamed(error))

    def _renamed(self, error: BaseException) -> BaseException:
        if isinstance(error, EinfoldError):
            return error
        made = ArtifactError(
            f"the thread that reads {self.file.path} failed: {type(error).__name__}: {error}"
        )
        made.__cause__ = error
        return made

    def _read(self, index: int) -> None:
        buffer = self._free.get()
        if buffer is None:
            raise _StopError
        started = time.perf_counter()
        views, place = [], 0
        for span in self._items[index]:
            size = room(span.offset, span.length)
            views.append(self.file.read(span.offset, span.length, buffer[place : place + size]))
            place += size
        self.counts.read_seconds += time.perf_counter() - started
        self.counts.items += 1
        self._full.put((index, buffer, views))


def located(views: Sequence[Bytes], spans: Sequence[Span], offset: int, length: int) -> Bytes:
    """The bytes of a place in the file, of an item's views over its spans."""
    for view, span in zip(views, spans, strict=True):
        if span.offset <= offset and offset + length <= span.offset + span.length:
            return view[offset - span.offset : offset - span.offset + length]
    raise ValueError(f"no span has {length} bytes at {offset}")


def merged(spans: Sequence[Span]) -> list[Span]:
    """Spans by place, those that lie within a page of each other as one: fewer and larger reads."""
    found: list[Span] = []
    for span in sorted(spans, key=lambda span: span.offset):
        if found and span.offset - (found[-1].offset + found[-1].length) < PAGE:
            end = max(found[-1].offset + found[-1].length, span.offset + span.length)
            found[-1] = Span(found[-1].offset, end - found[-1].offset)
        else:
            found.append(span)
    return found


def item_room(spans: Sequence[Span]) -> int:
    """Bytes of a buffer that an item is read into."""
    return sum(room(span.offset, span.length) for span in spans)
