"""The KV cache in memory: the buffers that the layout names, allocated once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..compiler.ir.cache_layout import CacheLayout

DTYPES: Mapping[str, npt.DTypeLike] = {
    "f32": np.float32,
    "f16": np.float16,
    "i8": np.int8,
    "u8": np.uint8,
}

Array = npt.NDArray[np.generic]

#: Makes a zeroed buffer of a shape and a dtype of the layout, where the runner keeps its caches.
Make = Callable[[tuple[int, ...], str], Any]


def in_memory(shape: tuple[int, ...], dtype: str) -> Array:
    """A zeroed buffer in NumPy."""
    return np.zeros(shape, DTYPES[dtype])


@dataclass
class Cache:
    """Buffers by name, each [batch, heads, tokens, size], and how many tokens each row holds."""

    buffers: dict[str, Array]
    lengths: npt.NDArray[np.int64]
    capacity: int

    @staticmethod
    def allocate(layout: CacheLayout, batch: int, capacity: int, make: Make = in_memory) -> Cache:
        """Zeroed buffers for `batch` rows of `capacity` tokens, exactly as the layout accounts for them."""
        buffers = {
            spec.name: make(spec.shape, spec.dtype) for spec in layout.buffers(batch, capacity)
        }
        return Cache(buffers, np.zeros(batch, np.int64), capacity)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the live buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def row(self, index: int) -> Cache:
        """One row as a cache of its own that shares the memory."""
        rows = slice(index, index + 1)
        return Cache(
            {n: b[rows] for n, b in self.buffers.items()}, self.lengths[rows], self.capacity
        )
