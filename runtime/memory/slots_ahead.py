"""Threads that read the slots of the next spilled layer while one runs, turn after turn and step after step.

    threads  | read 3 | read 5 |  wait  | read 7 | read 3 of the next step | ..
    caller            | with 3: run, keep | with 5: .. | with 7 .. |  choose a token  | with 3 ..

Layers come in an order that never changes, and lie in two stages by turns. What a layer's next turn reads of
the file is known when its turn ends, since only its own turn writes there.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ...compiler.ir.kv.spill import STAGES
from ...errors import ArtifactError, recognise
from ..buffers import Array, Counts
from .direct import READERS, Bytes, aligned
from .read_ahead import told
from .spilled import SpilledSlots

#: Bytes of one read.
_PIECE = 4 << 20

#: Seconds after which a caller looks whether the threads are still there.
_LOOK = 0.5


@dataclass
class Spilled:
    """What went to the file and came from it, and how long the caller waited for it."""

    read: int = 0
    written: int = 0
    waited_seconds: float = 0.0

    def sentence(self) -> str:
        """For people."""
        return (
            f"of spilled layers of the cache {self.read:,} bytes were read from the disk and "
            f"{self.written:,} written to it"
        )


@dataclass(frozen=True)
class _Part:
    """Bytes that are to be read for a turn."""

    number: int
    slots: SpilledSlots
    offset: int
    view: Bytes


class SlotsAhead:
    """`step`, then a `turn` of each layer, in order. `close` it."""

    def __init__(self, threads: int = READERS) -> None:
        self.counts = Spilled()
        self._layers: list[tuple[SpilledSlots, ...]] = []
        self._stages: list[Bytes] = []
        self._next = self._done = 0
        """Turns that were begun to be read, and that have run, counted on from step to step."""
        self._todo: deque[_Part] = deque()
        self._left: dict[int, int] = {}
        """Parts that are to come, by the number of their turn."""
        self._unread: dict[int, BaseException] = {}
        """What was met where a part of a turn was to be read."""
        self._reading = 0
        self._closed = False
        self._lock = threading.Lock()
        self._asked = threading.Condition(self._lock)
        """Wakes a thread that reads."""
        self._come = threading.Condition(self._lock)
        """Wakes the caller: a turn is there, or nothing is being read."""
        self._threads = [
            threading.Thread(target=self._run, name=f"einfold-slots-ahead-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def nbytes(self) -> int:
        """Bytes of the stages."""
        return sum(stage.nbytes for stage in self._stages)

    @staticmethod
    def stages(layers: Sequence[tuple[SpilledSlots, ...]]) -> list[int]:
        """Bytes of each stage while a step over these layers runs: as many layers as are there at once, of
        the size of the largest."""
        size = max(sum(slots.room for slots in layer) for layer in layers)
        return [size] * min(STAGES, len(layers))

    def step(self, layers: Sequence[tuple[SpilledSlots, ...]]) -> None:
        """A step over these layers begins. Where they are those of the step before, which ran to its end,
        what was read behind it is used."""
        known = len(layers) == len(self._layers) and all(
            a is b
            for mine, other in zip(self._layers, layers, strict=True)
            for a, b in zip(mine, other, strict=True)
        )
        if not known or self._done % len(layers):
            self.forget()
            self._make_stages(layers)
            self._layers = list(layers)
        begun = False
        try:
            self._begin()
            begun = True
        finally:
            if not begun:  # an interrupt: what was queued of a turn would be queued again
                self.forget()

    @contextmanager
    def turn(self, before: Counts, size: int) -> Iterator[dict[str, Array]]:
        """The buffers of the layer whose turn it is, by name, behind `before` tokens of each row; when the
        `with` ends, the `size` tokens that were written there are kept.

        Raises what a thread met, in this one, and what the disk says to what is written. The step
        may then be asked for again.
        """
        layer, number = self._layers[self._done % len(self._layers)], self._done
        kept = False
        try:
            self._wait(number)
            stages = self._parts_of(number)
            for slots, stage in zip(layer, stages, strict=True):
                slots.complete(stage, before)
            yield {s.name: s.array(stage) for s, stage in zip(layer, stages, strict=True)}
            for slots, stage in zip(layer, stages, strict=True):
                self.counts.written += slots.keep(stage, before, size)
            self._done = number + 1
            self._begin()
            kept = True
        finally:
            if not kept:
                self.forget()

    def forget(self) -> None:
        """Lets go of the layers, and of what was read for them, once no thread writes into a stage."""
        self._layers = []  # first, so that where this is interrupted the next step begins anew
        with self._lock:
            self._todo.clear()
            while self._reading and self._alive():
                self._come.wait(_LOOK)
            self._left.clear()
            self._unread.clear()
            self._next = self._done = 0

    def close(self) -> None:
        """Ends the threads and lets the stages go."""
        with self._lock:
            self._closed = True
            self._asked.notify_all()
            self._come.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)
        self._layers, self._stages = [], []
        self._todo.clear()

    def _make_stages(self, layers: Sequence[tuple[SpilledSlots, ...]]) -> None:
        """Has memory for these layers and no more: the stages of a longer cache go."""
        sizes = self.stages(layers)
        if [stage.nbytes for stage in self._stages] != sizes:
            self._stages = []
            self._stages = [aligned(size) for size in sizes]

    def _parts_of(self, number: int) -> list[Bytes]:
        """Where each buffer of a turn's layer lies in its stage."""
        stage, found = self._stages[number % len(self._stages)], []
        for slots in self._layers[number % len(self._layers)]:
            found.append(stage[: slots.room])
            stage = stage[slots.room :]
        return found

    def _begin(self) -> None:
        """Has those be read that come next, as many as there are stages."""
        with self._lock:
            if self._closed:
                raise self._ended()
            while self._next < self._done + len(self._stages):
                parts = list(self._to_read(self._next))
                self._left[self._next] = len(parts)
                self._todo += parts
                self._next += 1
            self._asked.notify_all()

    def _to_read(self, number: int) -> Iterator[_Part]:
        layer = self._layers[number % len(self._layers)]
        for slots, stage in zip(layer, self._parts_of(number), strict=True):
            for span in slots.to_read():
                for place in range(span.offset, span.end, _PIECE):
                    at, length = place - slots.start, min(_PIECE, span.end - place)
                    yield _Part(number, slots, place, stage[at : at + length])

    def _wait(self, number: int) -> None:
        """Until a turn's slots are there; raises what a thread met where they cannot be."""
        started = time.perf_counter()
        with self._lock:
            while self._left[number]:
                if self._closed or not self._alive():
                    raise self._ended()
                self._come.wait(_LOOK)
            del self._left[number]
            failed = self._unread.pop(number, None)
        self.counts.waited_seconds += time.perf_counter() - started
        if failed is not None:
            raise failed

    def _alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def _ended(self) -> ArtifactError:
        return ArtifactError(
            "the threads that read the spilled cache have ended; load the artifact again"
        )

    def _run(self) -> None:
        while self._read_next():  # nothing is held of what was read while this waits
            pass

    def _read_next(self) -> bool:
        part, failed = self._take(), None
        if part is None:
            return False
        try:
            part.slots.file.read(part.offset, len(part.view), part.view)
        except BaseException as error:  # the caller must hear of it: it waits
            failed = recognise(error) or told(
                error, f"the threads that read {part.slots.file.path} failed"
            )
        with self._lock:
            self._reading -= 1
            self.counts.read += len(part.view)
            if part.number in self._left:  # else another thread ended, and the turn was given up
                self._left[part.number] -= 1
            if failed is not None:
                self._unread.setdefault(part.number, failed)
            if not self._reading or not self._left.get(part.number):
                self._come.notify_all()
        return True

    def _take(self) -> _Part | None:
        """The next part to read; None at the end."""
        with self._lock:
            while not self._closed:
                if self._todo:
                    self._reading += 1
                    return self._todo.popleft()
                self._asked.wait()
            return None
