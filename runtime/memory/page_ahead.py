"""Threads that bring the pages of what comes next, round after round, and let go of what has been.

    threads  | bring 3 | bring 5 | bring 6 |  wait  | bring 3 | ..
    caller             | with 3 .. | with 5 .. | with 6 .. | with 3 ..

Items are stretches of a file (pages.py), used in an order that never changes. Which of an item's units are
read depends on the kind of the step, and is learned: the first time of a kind all are brought, from then on
those that were touched; of items that are routed, whose units the tokens choose, those that steps of the kind
touched most, the last ones counting most. What is brought and not yet let go stays within a window of bytes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ...errors import ArtifactError, recognise
from .direct import READERS
from .pages import UNIT, PagedFile
from .read_ahead import Counts, Span, told

#: What is left of how often a unit was touched when the next step is counted.
_FADES = 0.9

#: Seconds after which a caller looks whether the threads are still there.
_LOOK = 0.5


class PageAhead:
    """Make it in a `with`, or `close` it. Items are numbered on from round to round."""

    def __init__(
        self,
        file: PagedFile,
        items: Sequence[Span],
        window: int,
        routed: frozenset[int] = frozenset(),
        threads: int = READERS,
    ) -> None:
        self.file = file
        self.counts = Counts()
        self.kind: object = None
        """What the step that runs, or comes, is told apart by: steps of a kind touch the same pages."""
        self._items = list(items)
        self._all = [
            tuple(range(s.offset // UNIT, -(-(s.offset + s.length) // UNIT))) for s in items
        ]
        self._window = max(window // UNIT, *(len(units) for units in self._all))
        self._routed = routed
        self._often: dict[tuple[object, int], dict[int, float]] = {}
        """How often units of routed items were touched, by kind and item; what is long ago counts less."""
        self._learned: dict[tuple[object, int], tuple[int, ...]] = {}
        self._begun: dict[int, list[int]] = {}
        """Of each item that was begun the units that it has, and how many are not there yet."""
        self._todo: list[tuple[int, int]] = []
        self._next = self._done = self._held = 0
        self._closed = False
        self._unread: dict[int, BaseException] = {}
        """What was met where the units of an item were to be brought; the next of its turns tries again."""
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, name=f"einfold-page-ahead-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def units(self) -> int:
        """Units that were brought, or are being brought, and not let go."""
        return self._held

    @contextmanager
    def item(self, index: int) -> Iterator[None]:
        """The pages of an item are there until the `with` ends; others of a round that was broken off are let
        go. Raises what a thread met, in this one; the next round brings the item anew."""
        started = time.perf_counter()
        number = self._done + (index - self._done) % len(self._items)
        self._let_go(number)
        self._wait(number)
        self.counts.waited_seconds += time.perf_counter() - started
        try:
            yield
            self._learn(index)
        finally:
            self._let_go(number + 1)

    def close(self) -> None:
        """Ends the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)
        self.file.close()

    def _learn(self, index: int) -> None:
        span, key = self._items[index], (self.kind, index)
        if index in self._routed:
            self._learned[key] = self._likely(key, self.file.touched(span.offset, span.end))
        elif key not in self._learned:
            self._learned[key] = self.file.touched(span.offset, span.end)

    def _likely(self, key: tuple[object, int], touched: tuple[int, ...]) -> tuple[int, ...]:
        """As many units of a routed item as the step touched: those that were touched most, of late."""
        often = {unit: _FADES * count for unit, count in self._often.get(key, {}).items()}
        for unit in touched:
            often[unit] = often.get(unit, 0.0) + 1
        self._often[key] = often
        return tuple(sorted(sorted(often, key=lambda unit: -often[unit])[: len(touched)]))

    def _let_go(self, done: int) -> None:
        """The caller is done with so many items."""
        for number in range(self._done, done):
            span = self._items[number % len(self._items)]
            with self._changed:
                self._next = max(self._next, number + 1)  # one that was not begun is not to be
                kept = [entry for entry in self._todo if entry[0] != number]
                if number in self._begun:  # those that nobody has taken will not come
                    self._begun[number][1] -= len(self._todo) - len(kept)
                self._todo = kept
                while self._begun.get(number, [0, 0])[1] and self._reading():
                    self._changed.wait(_LOOK)
                self._unread.pop(number, None)
            if not self._closed:  # else the file is gone
                self.file.let_go(span.offset, span.offset + span.length)
            with self._changed:
                self._held -= self._begun.pop(number, [0])[0]
                self._done = number + 1
                self._changed.notify_all()

    def _reading(self) -> bool:
        return not self._closed and all(thread.is_alive() for thread in self._threads)

    def _wait(self, number: int) -> None:
        """Until the units of an item are there; raises what a thread met where one cannot be brought."""
        with self._changed:
            while self._closed or number not in self._begun or self._begun[number][1]:
                if not self._reading():
                    raise ArtifactError(
                        f"the threads that read {self.file.path} have ended; load the artifact again"
                    )
                self._changed.wait(_LOOK)
            failed = self._unread.get(number)
        if failed is not None:
            self._let_go(number + 1)
            raise failed

    def _run(self) -> None:
        while (unit := self._take()) is not None:
            number, place = unit
            started, failed = time.perf_counter(), None
            try:
                self.file.bring(place)
            except BaseException as error:  # the caller must hear of it: it waits
                failed = recognise(error) or told(
                    error, f"the threads that read {self.file.path} failed"
                )
            with self._changed:
                self.counts.read_seconds += (time.perf_counter() - started) / len(self._threads)
                self._begun[number][1] -= 1
                self.counts.items += not self._begun[number][1]
                if failed is not None:
                    self._unread.setdefault(number, failed)
                self._changed.notify_all()

    def _take(self) -> tuple[int, int] | None:
        """The next unit to bring, with the number of its item, once there is room; None at the end."""
        with self._changed:
            while not self._closed:
                if self._todo:
                    return self._todo.pop(0)
                index = self._next % len(self._items)
                units = self._learned.get((self.kind, index), self._all[index])
                room = self._held == 0 or self._held + len(units) <= self._window
                if room and self._next < self._done + len(self._items):
                    self._begun[self._next] = [len(units), len(units)]
                    self._held += len(units)
                    self._todo = [(self._next, unit) for unit in units]
                    self._next += 1
                    if not units:
                        self._changed.notify_all()
                else:
                    self._changed.wait()
            return None
