"""Ctrl-C and SIGTERM where Python would lose them, and tracing where threads would meet.

Python raises KeyboardInterrupt wherever it stands. Inside a fake tensor, a weak reference's callback or
a `__del__` that exception is swallowed or comes out as another one, and torch may be left half way. So the
signal is noted there, and raised where the region ends.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from .forks import settle_torch

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Later:
    """A region at whose end an interrupt that came within it is raised, whatever became of it inside.

    With `hold` the first one waits for the end, and a second is raised at once; without it each is raised
    where it comes as well. Nothing happens outside the main thread, which no signal reaches, nor to a
    signal that is ignored or ends the process. Regions nest.
    """

    def __init__(self, hold: bool = True) -> None:
        self._hold = hold
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._met: list[int] = []

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if callable(before):
                self._before[number] = before
                signal.signal(number, self._note)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._met and not isinstance(error, KeyboardInterrupt):
            self._before[self._met[0]](self._met[0], None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._hold and not self._met:
            self._met.append(number)
            return
        try:
            self._before[number](number, frame)
        except BaseException:
            self._met.append(number)
            raise


_tracing = threading.RLock()


@contextmanager
def tracing() -> Iterator[None]:
    """One thread at a time: capture, and what transformers loads, change torch for the whole process.

    An interrupt that torch swallows on the way is raised at the end.
    """
    settle_torch()
    with _tracing, Later(hold=False):
        yield


def _renew() -> None:
    """In a forked child the thread that held the lock is not there to let it go."""
    global _tracing
    _tracing = threading.RLock()


os.register_at_fork(after_in_child=_renew)
