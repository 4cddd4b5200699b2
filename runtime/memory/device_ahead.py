"""Copies what runs next from the machine's memory into a ring of buffers on a device, round after round.

    copies   | copy 3 | copy 5 | copy 6 |  wait  | copy 3 | ..     a stream of the device
    compute           | with 3 .. | with 5 .. | with 6 .. | ..     another

Both streams do what they are asked for in order, and nothing orders the one by the other but events. So

    a copy into a buffer waits for the event behind the last that read the buffer
    what reads a buffer waits for the event behind the copy into it

and the host waits for neither: it asks for a whole step ahead of the device. Items are used in an order that
never changes; item n of all rounds lies in buffer n % buffers, and is asked for as soon as the host is done
with the one that lay there. What is copied lies in page-locked memory, from which a device reads by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ...compiler.ir.weights import Weight
from ...errors import ArtifactError, OutOfMemoryError

#: What places in a block are a multiple of: kernels load sixteen bytes at once, caches have lines of 128.
_ALIGNED = 256


class Copies(Protocol):
    """Memory of a device and of its host, and the two streams. An event is whatever `wait` takes."""

    def on_device(self, nbytes: int) -> Tensor:
        """So many bytes on the device, u8. Raises OutOfMemoryError."""

    def on_host(self, nbytes: int) -> tuple[Tensor, str]:
        """So many bytes of the host, u8, and why they are not page-locked; "" where they are."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Asks the stream that copies for a copy from the host to the device."""

    def copied(self) -> Any:
        """An event behind all that the stream that copies was asked for."""

    def computed(self) -> Any:
        """An event behind all that the stream that computes was asked for."""

    def copy_behind(self, event: Any) -> None:
        """Copies that are asked for from now on wait for an event."""

    def compute_behind(self, event: Any) -> None:
        """What is computed from now on waits for an event."""

    def close(self) -> None:
        """Waits for the copies, and lets go of the host's memory."""


@dataclass(frozen=True)
class Block:
    """Weights by name, one behind the other in one stretch of memory."""

    weights: Mapping[str, Weight]

    @property
    def nbytes(self) -> int:
        return sum(map(_room, self.weights.values()))

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The weights that lie in the memory."""
        found, start = {}, 0
        for name, weight in self.weights.items():
            stretch = memory[start : start + weight.nbytes]
            found[name] = stretch.view(weight.dtype).view(weight.shape)
            start += _room(weight)
        return found

    def fill(self, memory: Tensor) -> None:
        """Loads the weights into the memory, one after the other."""
        for name, view in self.views(memory).items():
            view.copy_(self.weights[name].load())


def _room(weight: Weight) -> int:
    return -(-weight.nbytes // _ALIGNED) * _ALIGNED


class DeviceAhead:
    """Make it in a `with`, or `close` it. Nothing in it but `close` waits for the device."""

    def __init__(self, items: Sequence[Block], copies: Copies, buffers: int) -> None:
        """Loads the items into the host's memory. Raises OutOfMemoryError where the device has no room for
        the ring, before anything is loaded."""
        self._copies, self._items = copies, list(items)
        self.copied = 0
        """Bytes that copies were asked for, so far."""
        size = max(item.nbytes for item in items)
        self.unlocked = ""
        """Why some of the host's memory is not page-locked; "" where all is."""
        try:
            ring = [copies.on_device(size) for _ in range(min(buffers, len(items)))]
        except OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"the device has no room for {buffers} buffers of {size:,} bytes that weights are copied to: "
                "give a smaller memory budget, or end what else runs on the device"
            ) from error
        self._ring = ring
        self._views = [[item.views(buffer) for item in items] for buffer in ring]
        self._targets = [[buffer[: item.nbytes] for item in items] for buffer in ring]
        self._host = [self._loaded(item) for item in items]
        self._read: list[Any] = [None] * len(ring)
        """Of each buffer an event behind the last that read it."""
        self._there: list[Any] = [None] * len(ring)
        """Of each an event behind the copy into it that was asked for last."""
        self._done = self._asked = 0
        """How many items the caller is done with, and how many copies were asked for."""
        self._begun = self._closed = False

    @contextmanager
    def item(self, index: int) -> Iterator[dict[str, Tensor]]:
        """An item's weights by name, for what is computed until the `with` ends.

        Items come in order, round after round; behind a round that was broken off any may come, and what was
        asked for is asked for anew.
        """
        if self._closed:
            raise ArtifactError(
                "what copies weights to the device was closed: load the artifact again"
            )
        if not self._begun or index != self._done % len(self._items):
            self._begin(index)
        self._ask()
        place = self._done % len(self._ring)
        self._copies.compute_behind(self._there[place])
        try:
            yield self._views[place][index]
        finally:
            self._read[place] = self._copies.computed()
            self._done += 1
        self._ask()

    def close(self) -> None:
        """Waits for copies that were asked for, and lets the memory go. No item can be had from then on."""
        if not self._closed:
            self._closed = True
            self._copies.close()
            self._ring, self._views, self._targets, self._host = [], [], [], []

    def _loaded(self, item: Block) -> Tensor:
        memory, reason = self._copies.on_host(item.nbytes)
        self.unlocked = self.unlocked or reason
        item.fill(memory)
        return memory

    def _begin(self, index: int) -> None:
        """Begins at an item, whatever was asked for: all that was computed may have read every buffer."""
        self._begun = False  # an interrupt may come anywhere
        self._read = [self._copies.computed()] * len(self._ring)
        self._done = self._asked = index
        self._begun = True

    def _ask(self) -> None:
        """Asks for copies into all buffers that the caller is done with."""
        while self._asked < self._done + len(self._ring):
            place, index = self._asked % len(self._ring), self._asked % len(self._items)
            source, target = self._host[index], self._targets[place][index]
            self._copies.copy_behind(self._read[place])
            self._copies.copy(source, target)
            self._there[place] = self._copies.copied()
            self.copied += source.numel()
            self._asked += 1
