"""Which layers' slots of the cache lie in a file between their turns, where memory does not hold all.

A step reads all slots of a layer once, as it does weights, so every byte that is spilled is read in every
step, and none is better to keep than another. Spilled layers are spread evenly, so that the others run while
the next is read. In memory stay their newest tokens, and stages for the layer that runs and the one that is
read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..ir.kv.spill import STAGES


@dataclass(frozen=True)
class Slots:
    """What of a layer may lie in the file, in bytes for the context that is planned for."""

    layer: int
    first: str
    """The first super-op that reads them, and the last: in between they are in memory."""
    last: str
    nbytes: int
    """Of all slots: what a step reads."""
    tail: int
    """Of the newest tokens."""
    stage: int
    """Of memory while the layer runs."""
    token: int
    """Of one token: what a step writes, on average."""
    file: int
    """Of the file, in whole pages."""


@dataclass(frozen=True)
class Spill:
    """The layers whose slots lie in the file."""

    slots: tuple[Slots, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(entry.layer for entry in self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of their slots: what a step reads of the file at most."""
        return sum(entry.nbytes for entry in self.slots)

    @property
    def file(self) -> int:
        """Bytes of the file."""
        return sum(entry.file for entry in self.slots)

    @property
    def tails(self) -> int:
        return sum(entry.tail for entry in self.slots)

    @property
    def stages(self) -> int:
        return min(STAGES, len(self.slots)) * max(entry.stage for entry in self.slots)

    @property
    def written(self) -> int:
        """Bytes that a step of one token writes, on average."""
        return sum(entry.token for entry in self.slots)

    @property
    def moved(self) -> int:
        """Bytes that a step of one token reads and writes."""
        return self.nbytes + self.written

    def freed(self) -> int:
        """Bytes of memory that the cache takes less."""
        return self.nbytes - self.tails - self.stages

    def before(self, name: str) -> Slots | None:
        """What is read before a super-op runs."""
        return next((entry for entry in self.slots if entry.first == name), None)


def spills(slots: Sequence[Slots]) -> Iterator[list[Spill]]:
    """What may be spilled, for each size that the largest spilled layer may have: more and more of the layers
    that are no larger, evenly spread, by the memory that this frees."""
    for limit in sorted({entry.stage for entry in slots}):
        equal = [entry for entry in slots if entry.stage <= limit]
        found = []
        for count in range(1, len(equal) + 1):
            # The last of each stretch, so that something runs before the first is needed.
            chosen = [equal[(index + 1) * len(equal) // count - 1] for index in range(count)]
            found.append(Spill(tuple(chosen)))
        yield sorted((spill for spill in found if spill.freed() > 0), key=Spill.freed)
