"""A cache of which the slots of some layers lie in a file: its buffers, and their turns in a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...compiler.ir.kv.layout import Buffer, CacheLayout
from ...compiler.ir.kv.spill import spilled_buffers
from ...errors import DiskError
from ..buffers import CacheBuffers, empty
from .slots_ahead import SlotsAhead
from .spill_file import SpillFile
from .spilled import SpilledSlots


class SpilledCache:
    """Makes caches, one after the other, each with a file of its own, and brings their layers."""

    def __init__(self, folder: Path, layout: CacheLayout, layers: Sequence[int]) -> None:
        """`layers` are those that are spilled, in the order of their turns."""
        self.ahead = SlotsAhead()
        self._folder = folder
        self._names = [
            tuple(buffer.name for buffer in spilled_buffers(layout[layer], 1, 1))
            for layer in layers
        ]
        self._every = {name for names in self._names for name in names}
        self._file: SpillFile | None = None
        self._made: set[str] = set()
        """Buffers that lie in the file."""

    def make(self, spec: Buffer) -> Any:
        """The buffer that a cache asks for. One that lies in the file already is asked for by another cache,
        which gets another file. Raises DiskError where the disk has no room."""
        if spec.name not in self._every:
            return empty(spec)
        if spec.name in self._made:
            self._let_go()
        if self._file is None:
            self._file = SpillFile(self._folder)
        self._made.add(spec.name)
        try:
            return SpilledSlots.make(self._file, spec)
        except DiskError:
            self._let_go()
            raise

    def step(self, cache: CacheBuffers) -> None:
        """A step over a cache begins."""
        self.ahead.step(self._layers(cache))

    def stage_bytes(self, cache: CacheBuffers) -> int:
        """Bytes of the stages that a step over a cache takes beside it."""
        return sum(self.ahead.stages(self._layers(cache)))

    def close(self) -> None:
        """Ends the threads, and lets the file go once no cache has it."""
        self.ahead.close()
        self._let_go()

    def _layers(self, cache: CacheBuffers) -> list[tuple[Any, ...]]:
        return [tuple(cache.buffers[name] for name in names) for names in self._names]

    def _let_go(self) -> None:
        self.ahead.forget()
        self._file = None
        self._made = set()
