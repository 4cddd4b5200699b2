"""Speed of an artifact: load, prefill and decode at several contexts, on random tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PromptError
from ..model import Model, language_model, load

Progress = Callable[[str, float], None]


@dataclass
class Speed:
    """Medians over the runs. Decode rates are of the whole batch, by tokens of context."""

    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: dict[int, float]

    def data(self) -> dict[str, Any]:
        return dict(vars(self))


def measure_speed(
    artifact: Path,
    prompt_tokens: int,
    contexts: Sequence[int],
    new_tokens: int,
    batch: int,
    repeat: int,
    threads: int | None,
    chunk: int,
    progress: Progress,
    trust: bool = False,
) -> Speed:
    """Times an artifact. Decoding at a long context starts from a cache of random numbers, so that
    the time to fill it is not part of the wait; speed does not depend on what the numbers mean."""
    started = time.perf_counter()
    model = language_model(load(artifact, threads=threads, chunk=chunk, trust=trust))
    seconds = time.perf_counter() - started
    longest = max(prompt_tokens, *(context + new_tokens for context in contexts))
    if longest > model.engine.context:
        raise PromptError(
            f"{longest} tokens do not fit the artifact's context of {model.engine.context}"
        )
    prefill = []
    for run in range(repeat + 1):
        progress(f"prefill of {prompt_tokens}", run / (repeat + 1))
        prefill.append(prefill_seconds(model, prompt_tokens))
    rates = {}
    for context in contexts:
        steps = []
        for run in range(repeat + 1):
            progress(f"decode at {context}", run / (repeat + 1))
            steps.append(decode_seconds(model, context, new_tokens, batch))
        rates[context] = batch / statistics.median(steps[1:])
    return Speed(seconds, prompt_tokens / statistics.median(prefill[1:]), rates)


def prefill_seconds(model: Model, tokens: int, seed: int = 0) -> float:
    """Seconds to run a prompt of random tokens into an empty cache."""
    engine = model.engine
    ids = np.random.default_rng(seed).integers(0, engine.vocabulary, tokens)
    cache = engine.allocate(1, tokens, tokens)
    started = time.perf_counter()
    engine.prefill(cache, [ids])
    return time.perf_counter() - started


def decode_seconds(
    model: Model, context: int, new_tokens: int, batch: int = 1, seed: int = 0
) -> float:
    """Seconds of one decode step, the mean over `new_tokens`, behind `context` tokens of random cache.

    The cache is as it is right behind a prompt of so many tokens; see `Cache.assume`.
    """
    engine = model.engine
    random = np.random.default_rng(seed)
    cache = engine.allocate(batch, context + new_tokens)
    for spec in engine.layout.buffers(batch, context + new_tokens):
        if spec.role != "slots":
            continue  # packed tokens name places too, which not every number is
        buffer = cache.buffers[spec.name]
        noise = random.standard_normal(buffer.shape[1:], np.float32)
        # Buffers of a device take numbers in their own way.
        buffer[:] = (
            noise.astype(buffer.dtype)
            if isinstance(buffer, np.ndarray)
            else buffer.new_tensor(noise)
        )
    cache.assume(context)
    ids = random.integers(0, engine.vocabulary, (batch, 1))
    rows = np.arange(batch)
    started = time.perf_counter()
    for _ in range(new_tokens):
        cache.make_room(1)
        logits = engine.runner.step(cache, ids, cache.lengths[:, None], rows)
        ids = logits.argmax(-1)[:, None]
        cache.advance(1, engine.runner.observed)
    return (time.perf_counter() - started) / new_tokens
