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
from contextlib import contextmanager, suppress
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

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass
class Counts:
    """What was read so far, and how long each side waited for the other."""

    items: int = 0
    read_seconds: float = 0.0
    waited_seconds: float = 0.0
    asked: int = 0
    """Units of experts that steps of one token asked for."""
    held: int = 0
    """Those of them that had stayed."""


class ReadAhead:
    """Reads items, lists of spans, round after round. Make it in a `with`, or `close` it.

    Items are numbered on from round to round, and item n lies in buffer n % buffers. What is shared are two
    counts, each written by one side alone: how many items were read, and with how many the caller is done.
    So a caller may be interrupted anywhere and no buffer is lost; a queue only wakes the side that waits.
    """

    def __init__(self, file: DirectFile, items: Sequence[Sequence[Span]], buffers: int) -> None:
        self.file = file
        self.counts = Counts()
        self._items = [merged(spans) for spans in items]
        size = max(item_room(spans) for spans in self._items)
        self.nbytes = buffers * size
        self._buffers = [aligned(size) for _ in range(buffers)]
        self._views: list[list[Bytes]] = [[] for _ in range(buffers)]
        self._read = self._done = 0
        self._holder: object = None
        self._closed = False
        self._unread: dict[int, BaseException] = {}
        """What was met where an item was to be read, by its number; the reader alone writes here."""
        self._told: queue.SimpleQueue[None] = queue.SimpleQueue()
        """Wakes the caller."""
        self._asked: queue.SimpleQueue[None] = queue.SimpleQueue()
        """Wakes the reader."""
        self._thread = threading.Thread(target=self._run, name="einfold-read-ahead", daemon=True)
        self._thread.start()

    @contextmanager
    def item(self, index: int) -> Iterator[list[Bytes]]:
        """The bytes of an item's spans (those that touch are one), until the `with` ends.

        Items come in order, round after round; those of a round that was broken off are passed over. Raises
        what the reader met, in this thread; the next round reads the item anew.
        """
        started = time.perf_counter()
        own = self._holder = object()
        number = self._done + (index - self._done) % len(self._items)
        self._give_back(number)
        views = self._wait(number)
        self.counts.waited_seconds += time.perf_counter() - started
        try:
            yield views
        finally:
            if (
                self._holder is own
            ):  # a round that was broken off may be forgotten later than the next begins
                self._give_back(number + 1)

    def spans(self, index: int) -> list[Span]:
        """The spans of an item as they are given."""
        return self._items[index]

    def close(self) -> None:
        """Ends the thread and lets the buffers go."""
        self._closed = True
        self._asked.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)
        self.file.close()
        self._buffers, self._views = [], []

    def _give_back(self, done: int) -> None:
        """The caller is done with so many items; their buffers may be read into."""
        if done > self._done:
            self._done = done
            self._asked.put(None)

    def _wait(self, number: int) -> list[Bytes]:
        """The views of an item once it is read; raises what the reader met instead."""
        _drain(self._told)
        while self._closed or self._read <= number:
            alive = (
                self._thread.is_alive()
            )  # looked at first: what it did before it ended is seen then
            if self._closed or (not alive and self._read <= number):
                raise ArtifactError(
                    f"the thread that reads {self.file.path} has ended; load the artifact again"
                )
            with suppress(queue.Empty):
                self._told.get(timeout=_LOOK)
        failed = self._unread.get(number)
        if failed is not None:
            self._give_back(number + 1)
            raise failed
        return list(self._views[number % len(self._buffers)])

    def _run(self) -> None:
        while self._may_read():
            self._read_next()

    def _may_read(self) -> bool:
        """Waits until a buffer is free; False where the thread is to end."""
        _drain(self._asked)
        while not self._closed and self._read >= self._done + len(self._buffers):
            self._asked.get()
        return not self._closed

    def _read_next(self) -> None:
        number = self._read
        place, spans = number % len(self._buffers), self._items[number % len(self._items)]
        started = time.perf_counter()
        views = list[Bytes]()
        self._unread.pop(number - len(self._buffers), None)
        try:
            views = read_spans(self.file, spans, self._buffers[place])
        except BaseException as error:  # the caller must hear of it: it waits
            self._unread[number] = recognise(error) or told(
                error, f"the thread that reads {self.file.path} failed"
            )
        self.counts.read_seconds += time.perf_counter() - started
        self.counts.items += 1
        self._views[place] = views
        self._read = number + 1
        self._told.put(None)


def told(error: BaseException, failed: str) -> BaseException:
    """What a thread met and nobody recognises, as it is raised in another: an error of einfold's as it is,
    any other as one that says what `failed`."""
    if isinstance(error, EinfoldError):
        return error
    made = ArtifactError(f"{failed}: {type(error).__name__}: {error}")
    made.__cause__ = error
    return made


def _drain(wakings: queue.SimpleQueue[None]) -> None:
    """Takes out what nobody waited for; the one side that waits on it calls this, and looks again then."""
    with suppress(queue.Empty):
        while True:
            wakings.get_nowait()


def read_spans(file: DirectFile, spans: Sequence[Span], buffer: Bytes) -> list[Bytes]:
    """The bytes of spans, one behind the other in a buffer that has `item_room` for them."""
    views, start = [], 0
    for span in spans:
        size = room(span.offset, span.length)
        views.append(file.read(span.offset, span.length, buffer[start : start + size]))
        start += size
    return views


def located(views: Sequence[Bytes], spans: Sequence[Span], offset: int, length: int) -> Bytes:
    """The bytes of a place in the file, of an item's views over its spans."""
    for view, span in zip(views, spans, strict=True):
        if span.offset <= offset and offset + length <= span.offset + span.length:
            return view[offset - span.offset : offset - span.offset + length]
    raise ValueError(f"no span has {length} bytes at {offset}")


def merged(spans: Sequence[Span], apart: int = PAGE) -> list[Span]:
    """Spans by place, those that lie less than `apart` bytes from each other as one: fewer and larger
    reads."""
    found: list[Span] = []
    for span in sorted(spans, key=lambda span: span.offset):
        if found and span.offset - (found[-1].offset + found[-1].length) < apart:
            end = max(found[-1].offset + found[-1].length, span.offset + span.length)
            found[-1] = Span(found[-1].offset, end - found[-1].offset)
        else:
            found.append(span)
    return found


def item_room(spans: Sequence[Span]) -> int:
    """Bytes of a buffer that an item is read into."""
    return sum(room(span.offset, span.length) for span in spans)
