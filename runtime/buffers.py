"""The buffers of a KV cache that the layout names, and how far each row fills them."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..compiler.ir.kv.layout import (
    TOKENS,
    Buffer,
    CacheLayout,
    HeadGroup,
    cache_name,
)

DTYPES: Mapping[str, npt.DTypeLike] = {
    "f32": np.float32,
    "f16": np.float16,
    "i8": np.int8,
    "u8": np.uint8,
    "i32": np.int32,
}

Array = npt.NDArray[np.generic]
Counts = npt.NDArray[np.int64]

#: Bytes from which on a buffer is mapped by itself: some pages, so that little is lost in the last.
_MAPPED = 1 << 16

#: Makes the zeroed array that a buffer asks for, where the runner keeps its cache.
Make = Callable[[Buffer], Any]


def empty(spec: Buffer) -> Array:
    """The zeroed array in NumPy.

    A large one is mapped by itself, so that its memory goes back to the system the moment it is let go:
    the C library keeps what lies in its heap, and puts arrays of many megabytes there.
    """
    size = spec.bytes()
    if not isinstance(size, int) or size < _MAPPED:
        return np.zeros(spec.shape, DTYPES[spec.dtype])
    return np.frombuffer(mmap.mmap(-1, size), DTYPES[spec.dtype]).reshape(spec.shape)


Buffers = TypeVar("Buffers", bound="CacheBuffers")


@dataclass
class CacheBuffers:
    """Buffers by name, the tokens that each row has seen, and the slots that each row uses."""

    layout: CacheLayout
    buffers: dict[str, Any]
    lengths: Counts
    clocks: dict[str, Counts]
    """Used slots of each row, by the name of a counter; see `CacheLayout.clocks`."""
    capacity: int
    """Tokens that a row may see before the cache must `grow`."""
    prompt: int | None = None
    """Tokens of the longest prompt while it is being read, None afterwards."""
    groups: dict[str, HeadGroup] = field(default_factory=dict)
    """For each counter a group that goes by it."""
    packed: dict[str, Counts] = field(default_factory=dict)
    """Packed tokens of each row, by the name of a counter; see `CacheLayout.packs`."""
    make: Make = empty
    key_scales: Mapping[str, Array] = field(default_factory=dict)
    """What codes of keys are multiplied with [K, D], by the first part of a group's buffers' names, where its
    tokens change their slots by them; see `key_scales.py`."""
    given: Mapping[str, Array] = field(default_factory=dict)
    """What every step reads and none writes, a row for each row: what an encoder made of its input."""

    @classmethod
    def allocate(
        cls: type[Buffers],
        layout: CacheLayout,
        batch: int,
        capacity: int,
        prompt: int | None = None,
        make: Make = empty,
        given: Mapping[str, Array] | None = None,
        key_scales: Mapping[str, Array] | None = None,
    ) -> Buffers:
        """Zeroed buffers for `batch` rows of `capacity` tokens, exactly as the layout accounts for them.

        `prompt` is the length of the longest prompt that is to be read and then settled; without it the
        cache starts as one whose prompt has been read.
        """
        groups = layout.clocks()
        cache = cls(
            layout,
            {spec.name: make(spec) for spec in layout.buffers(batch, capacity, prompt)},
            np.zeros(batch, np.int64),
            {name: np.zeros(batch, np.int64) for name in groups},
            capacity,
            prompt,
            groups,
            {name: np.zeros(batch, np.int64) for name in layout.packs()},
            make,
            key_scales or {},
            given or {},
        )
        for name, used in cache.clocks.items():
            used += groups[name].policy.compensated  # slot 0 is taken from the start
        return cache

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the live buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    @property
    def counters(self) -> dict[str, Counts]:
        """Every counter that a step of the graph may read, by its name there."""
        return {TOKENS: self.lengths} | self.clocks | self.packed

    @property
    def untouched(self) -> bool:
        """Whether no slot of any row is in use."""
        return not any(used.any() for used in self.counters.values())

    def grow(self, capacity: int) -> None:
        """Takes room for `capacity` tokens a row in all; buffers move one at a time, what they hold stays."""
        self.capacity = max(self.capacity, capacity)
        for spec in self.layout.buffers(self.batch, self.capacity, self.prompt):
            old = self.buffers[spec.name]
            if tuple(old.shape) != spec.shape:
                self.buffers[spec.name] = new = self.make(spec)
                new[tuple(slice(0, size) for size in old.shape)] = old

    def copy(self: Buffers) -> Buffers:
        """The same tokens in memory of their own."""
        return self.select(np.arange(self.batch))

    def row(self: Buffers, index: int) -> Buffers:
        """One row as a cache of its own that shares the memory."""
        return self.select(slice(index, index + 1))

    def select(self: Buffers, rows: slice | Counts) -> Buffers:
        """Some rows as a cache of its own: a slice shares the memory, numbers of rows take copies."""
        return replace(
            self,
            buffers={name: buffer[rows] for name, buffer in self.buffers.items()},
            lengths=self.lengths[rows],
            clocks={name: used[rows] for name, used in self.clocks.items()},
            packed={name: count[rows] for name, count in self.packed.items()},
            given={name: array[rows] for name, array in self.given.items()},
        )

    def slots_of(self, clock: str) -> int:
        """Slots of the groups that go by a counter."""
        layer, index = self.layout.members(clock)[0]
        return int(self.buffers[f"{cache_name(layer.layer, index)}.key"].shape[2])

    def row_of(self, layer: int, index: int, row: int) -> dict[str, Any]:
        """What a group holds of one row beside packed tokens, by the last part of the buffers' names."""
        group, prefix = self.layout[layer].groups[index], cache_name(layer, index)
        names = [*group.by_slot, *(name for name, _ in group.policy.buffers(1, 1, 1, True))]
        found = {name: self.buffers.get(f"{prefix}.{name}") for name in names}
        return {name: buffer[row] for name, buffer in found.items() if buffer is not None}
