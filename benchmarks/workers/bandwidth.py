"""The memory bandwidth of this minute: threads that read a buffer far larger than the caches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .serve import Engine, serve

PACKAGES = ("numpy",)
BYTES = 1 << 30


class Reader(Engine):
    """Its `prefill` reads the whole buffer once; it decodes nothing."""

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        # Written, not zeroed: untouched pages would all be one page that stays in the cache.
        numbers = np.arange(BYTES // 4, dtype=np.float32)
        self._parts = np.array_split(numbers, threads)
        self._pool = ThreadPoolExecutor(threads)
        self.weight_bytes, self.cache_bytes = BYTES, 0

    def prefill(self, ids: list[int]) -> None:
        # Of numpy's reductions this one reads fastest: sums and dot products wait for their chain.
        list(self._pool.map(np.maximum.reduce, self._parts))

    def fill(self, context: int, room: int) -> None: ...

    def rewind(self, context: int) -> None: ...

    def step(self) -> None:
        self.prefill([])


if __name__ == "__main__":
    serve(Reader, PACKAGES)
