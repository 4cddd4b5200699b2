"""einfold on its artifact, as `einfold.load` gives it."""

from __future__ import annotations

from typing import Any

import numpy as np

import einfold
from einfold.runtime.cache import Cache

from .serve import Engine, serve

PACKAGES = ("einfold", "onnxruntime", "numpy")


class EinfoldEngine(Engine):
    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        loaded = einfold.load(model, threads=threads)
        self._engine = loaded.engine
        layout = self._engine.layout
        self.weight_bytes = self._engine.runner.weight_bytes
        # Of long contexts, where all layouts grow evenly.
        self.cache_bytes = (layout.read_bytes(1, 16384) - layout.read_bytes(1, 8192)) / 8192
        self._caches: dict[int, Cache] = {}
        self._cache: Cache | None = None
        self._ids = np.zeros((1, 1), np.int64)
        self._rows = np.zeros(1, np.int64)

    def prefill(self, ids: list[int]) -> None:
        cache = self._engine.allocate(1, len(ids), len(ids))
        self._engine.prefill(cache, [np.asarray(ids)])

    def fill(self, context: int, room: int) -> None:
        """Random numbers: filling by a prefill would take minutes and change no time."""
        random = np.random.default_rng(0)
        cache = self._engine.allocate(1, context + room)
        for name, buffer in cache.buffers.items():
            if name.endswith(".count"):
                buffer[:] = context  # tokens that a compensation token stands for
            elif buffer.dtype == np.int8:
                buffer[:] = random.integers(-127, 128, buffer.shape, np.int8)
            else:
                buffer[:] = random.standard_normal(buffer.shape, np.float32)
        self._caches[context] = cache

    def rewind(self, context: int) -> None:
        self._cache = self._caches[context]
        self._cache.assume(context)

    def step(self) -> None:
        cache = self._cache
        assert cache is not None
        positions = cache.lengths[:, None]
        cache.make_room(1)
        logits = self._engine.runner.step(cache, self._ids, positions, self._rows)
        self._ids[0, 0] = logits[0].argmax()
        cache.advance(1, self._engine.runner.observed)


if __name__ == "__main__":
    serve(EinfoldEngine, PACKAGES)
