"""What can run a compiled graph: one step further over a cache, or, where there is none, as a function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ArtifactError, EinfoldError, IRError, first_line, pass_on
from .buffers import Array
from .cache import Cache

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


@contextmanager
def running(name: str) -> Iterator[None]:
    """What the steps of a graph raise, as an ArtifactError: a graph that the compiler made raises nothing."""
    try:
        yield
    except Exception as error:
        if isinstance(error, EinfoldError) and not isinstance(error, IRError):
            raise
        pass_on(error)
        raise ArtifactError(f"the graph of {name} cannot be run: {first_line(error)}") from error


class Runner(Protocol):
    """Runs the graph on new tokens and updates the cache in place.

    One may have `make`, which makes the cache's buffers where it wants them, and `blocks`, (slots, tokens):
    it is faster over a cache for so many tokens or more whose slots are a multiple of the first; `most_pairs`
    of a new and a packed token in a step, where it makes numbers of all of a layer's at once. One that
    keeps to a budget has `check_room(rows, capacity, prompt)`, which raises OutOfMemoryError before a cache
    is made for which there is no room, `most_logits`, the rows of logits that a step may give, and `plan`,
    what lies where as it runs.
    """

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that are held."""

    @property
    def observed(self) -> Mapping[str, Array]:
        """What the last step gave beside logits and cache: queries of scored groups, by name."""

    def step(self, cache: Cache, input_ids: Ints, position_ids: Ints, logit_rows: Ints) -> Floats:
        """Processes `input_ids` [B, S] behind `cache.lengths`; gives logits [len(logit_rows), V].

        Writes keys and values into the cache's buffers and leaves its counters as they are: the caller
        has made room, and knows how many of the S tokens are real. The result is valid until the next step.
        """


class Caller(Protocol):
    """Runs the graph of an encoder: from its inputs to its results, and nothing is kept."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that are held."""

    def call(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All results by name, of all inputs by name, with the types that the manifest lists."""
