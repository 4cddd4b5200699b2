"""Buffers of slots that lie in a file while other layers run, but for their newest tokens.

The file holds a buffer as memory does, [B, K, C, D], and a stage has it at the same place within a page. So
reads and writes are direct, go to where attention reads, and take whole pages of either side as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...compiler.ir.kv.layout import Buffer
from ...compiler.ir.kv.spill import TAIL
from ...errors import EinfoldError
from ..buffers import DTYPES, Array, Counts, empty
from .direct import PAGE, Bytes, room
from .read_ahead import Span, merged
from .spill_file import SpillFile

#: Bytes between two reads that take no longer than a read does to begin: they are read as one.
_APART = 64 << 10


@dataclass(frozen=True)
class SpilledSlots:
    """Stands for a buffer of a cache; some rows of it share what they hold."""

    name: str
    file: SpillFile
    place: int
    """Of the first row in the file."""
    shape: tuple[int, int, int, int]
    dtype: np.dtype[Any]
    tail: Array
    """Slots `stored` .. `held` of each row, [B, K, TAIL, D]."""
    stored: Counts
    """Slots of each row that are in the file."""
    held: Counts
    """Slots of each row that were written."""
    some: bool = False
    """Whether there are other rows beside these."""

    @classmethod
    def make(cls, file: SpillFile, spec: Buffer) -> SpilledSlots:
        """An empty one. Raises DiskError where the disk has no room for it."""
        batch, heads, slots, size = (int(number) for number in spec.shape)
        shape = (batch, heads, slots, size)
        tail = replace(spec, shape=(batch, heads, min(slots, TAIL), size))
        place = file.take(int(spec.bytes()))
        counts = np.zeros((2, batch), np.int64)
        kind = np.dtype(DTYPES[spec.dtype])
        return cls(spec.name, file, place, shape, kind, empty(tail), counts[0], counts[1])

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.tail.nbytes

    def __getitem__(self, rows: slice) -> SpilledSlots:
        """Some rows that follow each other. Raises EinfoldError for numbers of rows, which would be
        copies."""
        if not isinstance(rows, slice):
            raise EinfoldError(f"{self.name} lies in a file, and rows of it are not copied")
        first, last, _ = rows.indices(self.shape[0])
        return replace(
            self,
            place=self.place + first * self._row_bytes,
            shape=(last - first, *self.shape[1:]),
            tail=self.tail[rows],
            stored=self.stored[rows],
            held=self.held[rows],
            some=self.some or last - first < self.shape[0],
        )

    @property
    def start(self) -> int:
        """The page of the file that the first slot lies in."""
        return self.place - self.place % PAGE

    @property
    def room(self) -> int:
        """Bytes of a stage."""
        return room(self.place, self.shape[0] * self._row_bytes)

    @property
    def _row_bytes(self) -> int:
        return self._head_bytes * self.shape[1]

    @property
    def _head_bytes(self) -> int:
        return self.shape[2] * self._slot_bytes

    @property
    def _slot_bytes(self) -> int:
        return self.shape[3] * self.dtype.itemsize

    def array(self, stage: Bytes) -> Array:
        """The buffer within a stage."""
        skipped = self.place - self.start
        size = self.shape[0] * self._row_bytes
        return stage[skipped : skipped + size].view(self.dtype).reshape(self.shape)

    def to_read(self) -> list[Span]:
        """Pages of the file that a stage wants: those of the slots that are stored, and what lies beside
        these rows in a page that is written whole."""
        spans = self._pages(np.zeros_like(self.stored), self.stored)
        if self.some:
            last = self.start + self.room
            spans += [Span(self.start, PAGE), Span(last - PAGE, PAGE)]
        return merged(spans, _APART)

    def complete(self, stage: Bytes, before: Counts) -> None:
        """Puts the newest slots into a stage that holds the stored ones, for a step behind `before` of each
        row. Raises EinfoldError where so many were never written."""
        if (before > self.held).any():
            row = int(np.flatnonzero(before > self.held)[0])
            raise EinfoldError(
                f"row {row} is continued behind token {before[row]:,}, and {self.name} holds "
                f"{self.held[row]:,}; read its text again"
            )
        slots = self.array(stage)
        for row, (stored, held) in enumerate(zip(self.stored, self.held, strict=True)):
            slots[row, :, stored:held] = self.tail[row, :, : held - stored]

    def keep(self, stage: Bytes, before: Counts, size: int) -> int:
        """Keeps `size` slots more of each row, behind `before`; gives how many bytes went to the file.

        Slots behind `before` that were held are forgotten: they were padding of a prompt, or of a step that
        gave nothing. The counts change when all that is to be written was.
        """
        slots = self.array(stage)
        end = before + size
        full = (end - 1) // TAIL * TAIL
        known = np.minimum(self.stored, before // TAIL * TAIL)
        wrote = 0
        for span in merged(self._pages(known, full)):
            self.file.write(span.offset, stage[span.offset - self.start :][: span.length])
            wrote += span.length
        for row, last in enumerate(end):
            begin = full[row]
            first = max(begin, before[row]) if begin == self.stored[row] else begin
            self.tail[row, :, first - begin : last - begin] = slots[row, :, first:last]
        self.stored[:], self.held[:] = full, end
        return wrote

    def _pages(self, first: Counts, last: Counts) -> list[Span]:
        """Pages of the file with slots `first` .. `last` of each row, those of each head by themselves."""
        spans = []
        for row, (begin, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            for head in range(self.shape[1] if begin < end else 0):
                at = self.place + row * self._row_bytes + head * self._head_bytes
                start = (at + begin * self._slot_bytes) // PAGE * PAGE
                stop = -(-(at + end * self._slot_bytes) // PAGE) * PAGE
                spans.append(Span(start, stop - start))
        return spans
