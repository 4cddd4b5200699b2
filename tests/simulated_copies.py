"""A device of two streams that is simulated in the memory of this process, for what copies weights ahead.

Nothing is ordered but by events, and what is not ordered goes wrong. A copy has begun as soon as it is asked
for, so that its target holds nothing of what lay there; it ends when something waits for an event behind it,
and not before. What torch computes meanwhile is watched: a call that reads a buffer whose copy was not waited
for, and a copy into a buffer whose readers were not, are a `RaceError`, whatever the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from einfold.errors import OutOfMemoryError


class RaceError(AssertionError):
    """Two streams at one buffer, and no event between them."""


@dataclass(frozen=True)
class Event:
    """Behind so many things that a stream was asked for."""

    stream: str
    count: int


class Simulated(TorchDispatchMode):
    """The `Copies` of device_ahead.py; what runs within it, as a `with`, is the stream that computes."""

    def __init__(self, room: int = 1 << 40, unlocked: str = "") -> None:
        """With `room` bytes on the device; host memory is not page-locked where it says why."""
        super().__init__()
        self.room, self.unlocked, self.closed = room, unlocked, False
        self._queue: list[Callable[[], None]] = []
        self._ran = self._ticks = 0
        self._seen_by_copies = self._seen_by_compute = 0
        """How many things of the other stream each waited for."""
        self._copied: dict[int, int] = {}
        self._read: dict[int, int] = {}
        """Of each buffer the copy into it that was asked for last, and its last reader."""
        self._itself = False
        self.copies = 0

    def on_device(self, nbytes: int) -> Tensor:
        if nbytes > self.room:
            raise OutOfMemoryError(f"the device has no {nbytes:,} bytes left")
        self.room -= nbytes
        return torch.full([nbytes], 255, dtype=torch.uint8)

    def on_host(self, nbytes: int) -> tuple[Tensor, str]:
        return torch.empty(nbytes, dtype=torch.uint8), self.unlocked

    def copy(self, source: Tensor, target: Tensor) -> None:
        place = _place(target)
        if self._read.get(place, 0) > self._seen_by_copies:
            raise RaceError("a copy into a buffer did not wait for what reads it")
        self._do(lambda: target.fill_(255))
        self._queue.append(lambda: self._do(lambda: target.copy_(source)))
        self._copied[place] = len(self._queue)
        self.copies += 1

    def copied(self) -> Event:
        return Event("copies", len(self._queue))

    def computed(self) -> Event:
        return Event("compute", self._ticks)

    def copy_behind(self, event: Event) -> None:
        assert event.stream == "compute"
        self._seen_by_copies = max(self._seen_by_copies, event.count)

    def compute_behind(self, event: Event) -> None:
        assert event.stream == "copies"
        for copy in self._queue[self._ran : event.count]:
            copy()
        self._ran = self._seen_by_compute = max(self._ran, event.count)

    def close(self) -> None:
        self.closed = True

    def _do(self, act: Callable[[], Any]) -> None:
        """Something of the device's own, which is no call that reads."""
        self._itself = True
        try:
            act()
        finally:
            self._itself = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not self._itself and not _looks(func):
            self._ticks += 1
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs or {})):
                if isinstance(tensor, Tensor) and _place(tensor) in self._copied:
                    self._reads(_place(tensor))
        return func(*args, **(kwargs or {}))

    def _reads(self, place: int) -> None:
        if self._copied[place] > self._seen_by_compute:
            raise RaceError("a call reads a buffer and did not wait for the copy into it")
        self._read[place] = self._ticks


class Forgetful(Simulated):
    """The same where one kind of order is left out, which is then to be seen."""

    def __init__(self, forgets: str) -> None:
        super().__init__()
        self._forgets = forgets
        self._before = Event("compute", 0)

    def copy_behind(self, event: Event) -> None:
        if self._forgets != "copy_behind":
            super().copy_behind(event)

    def compute_behind(self, event: Event) -> None:
        if self._forgets != "compute_behind":
            super().compute_behind(event)

    def computed(self) -> Event:
        """The one that was asked for before, ahead of the last readers."""
        before, self._before = self._before, super().computed()
        return before if self._forgets == "last" else self._before

    def copied(self) -> Event:
        event = super().copied()
        return Event("copies", event.count - 1) if self._forgets == "copied" else event


class Interrupted(Simulated):
    """The same where a call of one of its methods, counted from `arm` on, is interrupted, before or behind
    what it does."""

    def __init__(self, behind: bool) -> None:
        super().__init__()
        self._behind, self._left = behind, -1

    def arm(self, calls: int) -> None:
        """The next but so many is interrupted."""
        self._left = calls

    @property
    def armed(self) -> bool:
        """Whether it is still to come."""
        return self._left >= 0

    def _call(self, method: Callable[..., Any], *given: Any) -> Any:
        now, self._left = self._left == 0, max(self._left - 1, -1)
        if now and not self._behind:
            raise KeyboardInterrupt
        found = method(*given)
        if now:
            raise KeyboardInterrupt
        return found

    def copy(self, source: Tensor, target: Tensor) -> None:
        self._call(super().copy, source, target)

    def copied(self) -> Any:
        return self._call(super().copied)

    def computed(self) -> Any:
        return self._call(super().computed)

    def copy_behind(self, event: Event) -> None:
        self._call(super().copy_behind, event)

    def compute_behind(self, event: Event) -> None:
        self._call(super().compute_behind, event)


#: What may be left out.
ORDERS = ("copy_behind", "compute_behind", "last", "copied")


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.device.type == "cpu" else 0


def _looks(func: Any) -> bool:
    """Whether a call only makes a view."""
    returns = func._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )
