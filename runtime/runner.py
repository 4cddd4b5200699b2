"""What can run a compiled graph one step further over a cache."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from .cache import Cache

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Runner(Protocol):
    """Runs the graph on new tokens and updates the cache in place."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that are held."""

    def step(self, cache: Cache, input_ids: Ints, position_ids: Ints, logit_rows: Ints) -> Floats:
        """Processes `input_ids` [B, S] behind `cache.lengths`; gives logits [len(logit_rows), V].

        Writes keys and values into the cache's buffers and leaves `cache.lengths` as it is: the caller
        knows how many of the S tokens are real. The result is valid until the next step.
        """
