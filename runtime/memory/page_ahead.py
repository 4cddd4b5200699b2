"""Threads that bring the pages of what comes next, round after round, and let go of what has been.

    threads  | bring 3 | bring 5 | bring 6 |  wait  | bring 3 | ..
    caller             | with 3 .. | with 5 .. | with 6 .. | with 3 ..

Items are stretches of a file (pages.py), used in an order that never changes. Which of an item's units are
read depends on the kind of the step, and is learned: the first time of a kind all that are likely to be are
brought, from then on those that were touched. What is brought and not yet let go stays within a window of
bytes: an item begins to come as soon as there is room for a unit of it.

Of items that are routed the caller says what its tokens chose; what is not there is brought then, and where
there are such an item comes once there is room for all of it. Units that an eviction policy takes for likely
stay when the others are let go (experts.py), in what the window leaves of all the room: it is smaller in a
step of one token, which reads few experts of a layer, than in one of many.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ...errors import ArtifactError, recognise
from .direct import READERS
from .experts import Frequent, Recent, Routed, best
from .pages import UNIT, PagedFile
from .read_ahead import Counts, Span, merged, told

#: Seconds after which a caller looks whether the threads are still there.
_LOOK = 0.5


@dataclass
class _Begun:
    """An item whose units come or have come."""

    units: set[int]
    """Units that are asked for; others of it may be there because they stayed."""
    there: set[int] = field(default_factory=set)
    """Those of them that were brought, or could not be."""

    @property
    def left(self) -> int:
        """How many are to come."""
        return len(self.units - self.there)


class PageAhead:
    """Make it in a `with`, or `close` it. Items are numbered on from round to round."""

    def __init__(
        self,
        file: PagedFile,
        items: Sequence[Span],
        window: tuple[int, int],
        routed: Mapping[int, Routed] | None = None,
        room: int = 0,
        first: Sequence[int] | None = None,
        threads: int = READERS,
        policy: Callable[[int], Frequent | Recent] = Frequent,
    ) -> None:
        """`window` are the bytes that are brought and not let go, and those of them in a step of one token,
        which leave room for one item of many; with `room` beside them, what stays of the `routed` items, by
        their index, takes the rest. Of each item so many bytes come `first`, until it is known which are
        read; without it all."""
        self.file = file
        self.counts = Counts()
        self.kind: object = None
        """What the step that runs, or comes, is told apart by: steps of a kind touch the same pages."""
        self._items = list(items)
        self._all = [
            tuple(range(s.offset // UNIT, -(-(s.offset + s.length) // UNIT))) for s in items
        ]
        ends = [s.offset + n for s, n in zip(items, first, strict=True)] if first else None
        self._first = [
            units if ends is None else tuple(unit for unit in units if unit * UNIT < ends[n])
            for n, units in enumerate(self._all)
        ]
        self._routed = dict(routed or {})
        self._of_one = dict(self._routed)
        """The same as a step of one token was found to read it, which leaves sums out."""
        self._found: set[tuple[int, int]] = set()
        """Items and experts of which that was found."""
        most = [
            self._routed[n].most if n in self._routed else len(u) for n, u in enumerate(self._all)
        ]
        self._many, self._few = (nbytes // UNIT for nbytes in window)
        if self._routed:
            self._many = max(self._many, *(len(units) for units in self._all))
            self._few = max(self._few, *most)
        self._total = self._many + room // UNIT
        self._tokens = 0
        """Of the step that runs, or comes; 0 where that is not known yet, and may be many."""
        self._policy = policy(-(-file.size // UNIT))
        self._stay: set[int] = set()
        """Units of routed items that are there beside what was begun."""
        self._learned: dict[tuple[object, int], tuple[int, ...]] = {}
        self._chosen: dict[int, set[int]] = {}
        """Of routed items that come the units that their tokens read, once these have chosen."""
        self._begun: dict[int, _Begun] = {}
        self._todo: list[tuple[int, int]] = []
        self._next = self._done = 0
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
        """Units that were brought, or are being brought, and not let go; where items are routed with those
        that are to come of what was begun."""
        begun = sum(len(begun.units) for begun in self._begun.values())
        return begun if self._routed else begun - len(self._todo)

    @property
    def staying(self) -> int:
        """Units of experts that stayed."""
        return len(self._stay)

    def step(self, kind: object, tokens: int) -> None:
        """A step of a kind begins, of so many tokens; what stayed is let go where it needs a larger
        window."""
        with self._changed:
            self.kind, self._tokens = kind, tokens
            self._policy.step(tokens)
            gone = self._evict(self._stay, 0)
        self._give_up(gone)

    @contextmanager
    def item(self, index: int, chosen: npt.NDArray[np.int64] | None = None) -> Iterator[None]:
        """The pages of an item are there until the `with` ends, of one that is routed those of the experts
        that were `chosen`, [T, choices]; others of a round that was broken off are let go. Raises what a
        thread met, in this one; the next round brings the item anew."""
        started = time.perf_counter()
        number = self._done + (index - self._done) % len(self._items)
        self._let_go(number)
        if chosen is not None:
            self._choose(number, index, chosen)
        self._wait(number)
        self.counts.waited_seconds += time.perf_counter() - started
        try:
            yield
            self._learn(index, chosen)
            if chosen is None:
                self._correct(number, index)
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

    def _learn(self, index: int, chosen: npt.NDArray[np.int64] | None) -> None:
        """Looks which units were touched, where that is not known yet: of a kind of step, and of experts that
        one token chose, which leaves sums out."""
        key = self.kind, index
        new = [] if chosen is None else self._not_found(index, chosen)
        if key in self._learned and not new:
            return
        span = self._items[index]
        self._learned[key] = touched = self.file.touched(span.offset, span.end)
        if chosen is not None:
            known = self._known()
            experts, found = dict(known[index].experts), set(touched)
            for expert in new:
                experts[expert] = tuple(unit for unit in experts[expert] if unit in found)
            # What every token reads is known by the first.
            every = tuple(unit for unit in known[index].always if unit in found)
            known[index] = replace(known[index], always=every, experts=experts)
            self._found |= {(index, expert) for expert in new}

    def _correct(self, number: int, index: int) -> None:
        """Has those units come too that the run found missing and read itself, one by one."""
        with self._changed:
            begun = self._begun.get(number) or _Begun(set())
            left = [unit for unit in self._all[index] if unit not in begun.units]
        missed = self.file.mapped(left)
        if missed:
            self.file.bytes_read += len(missed) * UNIT
            known = {*self._learned[self.kind, index], *missed}
            self._learned[self.kind, index] = tuple(sorted(known))

    def _known(self) -> dict[int, Routed]:
        """What routed items read in a step as it runs."""
        return self._of_one if self._tokens == 1 else self._routed

    def _not_found(self, index: int, chosen: npt.NDArray[np.int64]) -> list[int]:
        """Experts of which is not known yet what one token reads, where it is one that reads."""
        if self._tokens != 1:
            return []
        experts = self._of_one[index].chosen(chosen)
        return [expert for expert in experts if (index, expert) not in self._found]

    def _choose(self, number: int, index: int, chosen: npt.NDArray[np.int64]) -> None:
        """Says what an item is read for, and those behind it of the same layer; what is missing comes
        first."""
        known, layer = self._known(), self._routed[index].layer
        with self._changed:
            for later in range(index, len(self._items)):
                if later not in known or known[later].layer != layer:
                    break
                self._chosen[number + later - index] = known[later].asked(chosen)
            asked = self._chosen[number]
            held = asked & self._stay
            begun = self._begun.get(number)
            gone = set[int]()
            if begun is not None:
                missing = asked - held - begun.units
                self._todo = [*((number, unit) for unit in sorted(missing)), *self._todo]
                begun.units |= missing
                over = self.units + len(self._stay) - self._total
                others = best(self._stay - held, self._policy.scores, len(self._stay - held) - over)
                gone = self._stay - held - others
                self._stay -= gone
            self._policy.chose(self._of_one[index], chosen)
            self._changed.notify_all()
        self._give_up(gone)
        if self._not_found(index, chosen):  # what is mapped of other steps would count as read
            self._each(self.file.unmap, held)
        if self._tokens == 1:
            always = set(known[index].always)
            self.counts.asked += len(asked - always)
            self.counts.held += len(held - always)

    def _evict(self, units: set[int], own: int) -> set[int]:
        """Of units that may stay the others: within the room that the window of the step leaves, and what was
        begun beside `own` units that are done with. The caller has the lock, and lets them go."""
        window = self._few if self._tokens == 1 else self._many
        self._stay = best(units, self._policy.scores, self._total - max(window, self.units - own))
        return units - self._stay

    def _give_up(self, units: Iterable[int]) -> None:
        if not self._closed:  # else the file is gone
            self._each(self.file.let_go, units)

    def _each(self, act: Callable[[int, int], None], units: Iterable[int]) -> None:
        """Does something with stretches of units that follow each other."""
        for span in merged([Span(unit * UNIT, UNIT) for unit in units]):
            act(span.offset, span.end)

    def _let_go(self, done: int) -> None:
        """The caller is done with so many items."""
        for number in range(self._done, done):
            index = number % len(self._items)
            with self._changed:
                self._next = max(self._next, number + 1)  # one that was not begun is not to be
                kept = [entry for entry in self._todo if entry[0] != number]
                begun = self._begun.get(number) or _Begun(set())
                # Those that nobody has taken will not come.
                begun.units -= {unit for at, unit in self._todo if at == number}
                self._todo = kept
                while begun.left and self._reading():
                    self._changed.wait(_LOOK)
                failed = self._unread.pop(number, None) is not None
                gone = set(self._all[index])
                if index in self._routed:
                    there = set() if failed else begun.units
                    gone = (gone | self._evict(self._stay | there, len(begun.units))) - self._stay
            self._give_up(gone)
            with self._changed:
                self._begun.pop(number, None)
                self._chosen.pop(number, None)
                self._done = number + 1
                self._changed.notify_all()

    def _reading(self) -> bool:
        return not self._closed and all(thread.is_alive() for thread in self._threads)

    def _wait(self, number: int) -> None:
        """Until the units of an item are there; raises what a thread met where one cannot be brought."""
        with self._changed:
            while self._closed or number not in self._begun or self._begun[number].left:
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
                self._begun[number].there.add(place)
                self.counts.items += not self._begun[number].left
                if failed is not None:
                    self._unread.setdefault(number, failed)
                self._changed.notify_all()

    def _take(self) -> tuple[int, int] | None:
        """The next unit to bring, with the number of its item, once there is room; None at the end."""
        with self._changed:
            while not self._closed:
                window = self._few if self._tokens == 1 else self._many
                # What the caller waits for comes in any case: of steps that were not seen yet it may be more.
                room = self.units < window
                if self._todo and (room or self._routed or self._todo[0][0] == self._done):
                    return self._todo.pop(0)
                units = None if self._todo else self._coming(self._next)
                if self._routed:
                    room = self.units == 0 or self.units + len(units or ()) <= window
                else:
                    room = room or self._next == self._done
                if units is not None and room and self._next < self._done + len(self._items):
                    self._begun[self._next] = _Begun(set(units))
                    self._todo = [(self._next, unit) for unit in units]
                    self._next += 1
                    self._changed.notify_all()
                else:
                    self._changed.wait()
            return None

    def _coming(self, number: int) -> list[int] | None:
        """The units to bring of an item; None where that is not known before its tokens have chosen."""
        index = number % len(self._items)
        every, routed = self._all[index], self._routed.get(index)
        if routed is None:
            return list(self._learned.get((self.kind, index), self._first[index]))
        asked: Iterable[int] | None = self._chosen.get(number)
        if asked is None and self._tokens * routed.choices >= 2 * len(routed.experts):
            asked = every  # of many tokens some will choose each
        return None if asked is None else [unit for unit in sorted(asked) if unit not in self._stay]
