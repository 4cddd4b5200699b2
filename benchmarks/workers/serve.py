"""The worker's side of the benchmark: one engine in one process, asked over JSON lines.

Every engine is timed by the same few lines here. Questions come on stdin; answers go to what was
stdout, which libraries can no longer print on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import metadata
from typing import Any

#: Steps before the clock starts: the first one after a change of context binds and allocates.
WARM_STEPS = 2


class Engine(ABC):
    """What an engine must be able to do. The constructor loads the model and is timed."""

    weight_bytes: int
    """Bytes of weights that one decode step must read."""

    cache_bytes: float
    """Bytes of cache that one decode step must read for each token of context."""

    @abstractmethod
    def prefill(self, ids: list[int]) -> None:
        """Runs a prompt into an empty cache, as far as the logits behind its last token."""

    @abstractmethod
    def fill(self, context: int, room: int) -> None:
        """Makes a cache that holds `context` tokens and has room for more. Not timed."""

    @abstractmethod
    def rewind(self, context: int) -> None:
        """Goes back to where `fill(context)` ended. Not timed."""

    @abstractmethod
    def step(self) -> None:
        """Decodes one token greedily behind the context last rewound to."""


def serve(load: Callable[[str, int, dict[str, Any]], Engine], packages: tuple[str, ...]) -> None:
    """Answers questions until stdin ends: `load`, `prefill`, `fill`, `decode`.

    `packages` are the distributions whose versions go into the results.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    versions = {name: metadata.version(name) for name in packages}
    _send(answers, {"versions": versions})
    engine: Engine | None = None
    for line in sys.stdin:
        question = json.loads(line)
        kind = question["ask"]
        try:
            if kind == "load":
                started = time.perf_counter()
                engine = load(question["model"], question["threads"], question["options"])
                loaded = time.perf_counter()
                engine.prefill([1])
                _send(
                    answers,
                    {
                        "load": loaded - started,
                        "first": time.perf_counter() - loaded,
                        "weight_bytes": engine.weight_bytes,
                        "cache_bytes": engine.cache_bytes,
                    },
                )
                continue
            assert engine is not None
            _send(answers, {"seconds": _ask(engine, kind, question)})
        except Exception as error:  # whatever an engine raises is a row of the table
            _send(answers, {"error": f"{type(error).__name__}: {error}".splitlines()[0]})


def _ask(engine: Engine, kind: str, question: dict[str, Any]) -> float:
    if kind == "prefill":
        ids = [(7 * i) % 251 + 2 for i in range(question["tokens"])]
        started = time.perf_counter()
        engine.prefill(ids)
    elif kind == "fill":
        started = time.perf_counter()
        engine.fill(question["context"], question["room"])
    else:
        engine.rewind(question["context"])
        for _ in range(WARM_STEPS):
            engine.step()
        started = time.perf_counter()
        for _ in range(question["tokens"]):
            engine.step()
    return time.perf_counter() - started


def _send(answers: Any, data: dict[str, Any]) -> None:
    answers.write(json.dumps(data) + "\n")
    answers.flush()
