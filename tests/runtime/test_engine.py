from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einfold
from einfold.errors import NotFiniteError, OutOfMemoryError, PromptError
from einfold.runtime.cache import Cache
from einfold.runtime.sampling import Sampling

from .. import models
from ..greedy import all_logits


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, models.VOCABULARY, length).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("portable", [False, True])
def test_chunks_change_nothing(chunk: int, portable: bool, artifact: Callable[..., Path]) -> None:
    path = artifact("gemma2", portable=portable)
    whole = einfold.load(path, chunk=512, threads=1)
    cut = einfold.load(path, chunk=chunk, threads=1)
    text = prompt(40)
    a = all_logits(whole, text)
    b = all_logits(cut, text)
    assert np.abs(a - b).max() < 1e-5


def test_the_cache_is_allocated_once_and_as_accounted(artifact: Callable[..., Path]) -> None:
    model = einfold.load(artifact("qwen3"), threads=1)
    model.generate_batch([prompt(9), prompt(4)], max_new_tokens=6, ignore_eos=True)
    cache = model.engine.cache
    assert cache is not None
    assert cache.capacity == 9 + 6 - 1
    assert cache.nbytes == model.artifact.manifest.layout().bytes(2, cache.capacity)
    assert cache.lengths.tolist() == [9 + 5, 4 + 5]


def test_one_cache_is_held_at_a_time(
    artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = einfold.load(artifact("qwen3"), threads=1)
    held: list[Cache | None] = []
    allocate = model.engine.allocate

    def watched(*sizes: Any) -> Cache:
        held.append(model.engine.cache)
        return allocate(*sizes)

    monkeypatch.setattr(model.engine, "allocate", watched)
    for _ in range(2):
        model.generate(prompt(5), max_new_tokens=2, ignore_eos=True)
        all_logits(model, prompt(5))
    assert held == [None] * 4


@pytest.mark.parametrize("portable", [False, True])
def test_a_step_writes_the_cache_in_place(portable: bool, artifact: Callable[..., Path]) -> None:
    """Only the new token's slots change, in the very buffers that were bound."""
    model = einfold.load(artifact("llama", portable=portable), threads=1)
    cache = Cache.allocate(model.engine.layout, 2, 8)
    for buffer in cache.buffers.values():
        buffer[:] = 0.25
    addresses = {name: buffer.ctypes.data for name, buffer in cache.buffers.items()}
    cache.lengths[:] = [3, 5]
    ids = np.array([[7], [9]])
    model.engine.runner.step(cache, ids, cache.lengths[:, None], np.arange(2))
    for name, buffer in cache.buffers.items():
        assert buffer.ctypes.data == addresses[name]
        changed = np.flatnonzero((buffer != 0.25).any(axis=(1, 3)).ravel())
        assert changed.tolist() == [3, 8 + 5]


def test_rows_end_on_their_own(artifact: Callable[..., Path]) -> None:
    """A row that ends early leaves the others as they would be alone."""
    model = einfold.load(artifact("llama"), threads=1)
    prompts = [prompt(5, 1), prompt(8, 2), prompt(3, 3)]
    alone = [model.engine.generate([p], 20)[0].tokens for p in prompts]
    stop = [alone[0][4]]
    together = model.engine.generate(prompts, 20, stop_tokens=stop)
    for single, result in zip(alone, together, strict=True):
        place = single.index(stop[0]) if stop[0] in single else None
        assert result.tokens == single[:place]
        assert result.finish_reason == ("stop" if place is not None else "length")


def test_generation_ends_with_the_context(artifact: Callable[..., Path]) -> None:
    model = einfold.load(artifact("llama"), threads=1)
    result = model.generate(prompt(250), max_new_tokens=100, ignore_eos=True)
    assert result.finish_reason == "context"
    assert len(result.tokens) == models.CONTEXT - 250 + 1
    short = model.generate(prompt(250), max_new_tokens=3, ignore_eos=True)
    assert short.tokens == result.tokens[:3]


def test_seeded_sampling_repeats_in_a_batch(artifact: Callable[..., Path]) -> None:
    model = einfold.load(artifact("llama"), threads=1)
    settings = Sampling(temperature=1.0, seed=5)
    runs = [
        [
            r.tokens
            for r in model.generate_batch(
                [prompt(4), prompt(6)], max_new_tokens=10, sampling=settings, ignore_eos=True
            )
        ]
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    alone = model.generate_batch([prompt(4)], max_new_tokens=10, sampling=settings, ignore_eos=True)
    assert alone[0].tokens == runs[0][0]  # a row draws the same whatever stands beside it
    twice = model.generate_batch(
        [prompt(4)] * 2, max_new_tokens=10, sampling=settings, ignore_eos=True
    )
    assert twice[0].tokens != twice[1].tokens
    other = model.generate_batch(
        [prompt(4)], max_new_tokens=10, sampling=Sampling(temperature=1.0, seed=6), ignore_eos=True
    )
    assert other[0].tokens != runs[0][0]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "empty"),
        ([3, 4, models.VOCABULARY], "token 128 at position 2 is out of range"),
        ([3, -1], "token -1 at position 1 is out of range"),
        ([3, 10**30], "at position 1 is out of range"),
        ([1.5, 2.0], "whole numbers"),
        (["one", "two"], "whole numbers"),
        ([[3, 4], [5, 6]], "whole numbers"),
        (list(range(3, 103)) * 3, "the prompt has 300 tokens.*context of 256"),
    ],
)
def test_bad_prompts(tokens: Any, message: str, artifact: Callable[..., Path]) -> None:
    model = einfold.load(artifact("llama"), threads=1)
    with pytest.raises(PromptError, match=message):
        model.generate(tokens)


def test_no_new_tokens(artifact: Callable[..., Path]) -> None:
    model = einfold.load(artifact("llama"), threads=1)
    model.generate(prompt(5), max_new_tokens=2)
    assert model.generate(prompt(5), max_new_tokens=0).tokens == []
    assert model.timings.prefill_tokens == 0
    with pytest.raises(PromptError, match="max_new_tokens must be 0 or more"):
        model.generate(prompt(5), max_new_tokens=-1)


def test_logits_checks_every_token(artifact: Callable[..., Path]) -> None:
    model = einfold.load(artifact("llama"), threads=1)
    for wrong in (-1, models.VOCABULARY):
        with pytest.raises(PromptError, match="at position 1 is out of range"):
            next(model.logits([3, wrong]))


def test_text_needs_a_tokenizer(artifact: Callable[..., Path]) -> None:
    with pytest.raises(PromptError, match="holds no tokenizer"):
        einfold.load(artifact("llama"), threads=1).generate("hello")


def test_one_token_prompts_are_read_together_and_settled(tmp_path: Path) -> None:
    """Their only step looks like one of decoding, but the buffers that it was bound to are replaced."""
    out = tmp_path / "a"
    method = "streaming_llm:sinks=1,recent=20,slack=10"
    einfold.compile(models.build("llama"), out, prune=method, check=False)
    model = einfold.load(out, threads=1)
    together = model.generate_batch([[5], [7]], max_new_tokens=12, ignore_eos=True)
    for first, row in zip((5, 7), together, strict=True):
        alone = model.generate([first], max_new_tokens=12, ignore_eos=True)
        assert row.tokens == alone.tokens


@pytest.mark.parametrize("engine", ["onnx", "reference"])
@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_logits_that_were_given_stay(
    chunk: int, engine: Any, artifact: Callable[..., Path]
) -> None:
    """Each chunk's array is its own, whatever the runner does with its buffers."""
    model = einfold.load(artifact("qwen3"), engine=engine, threads=1, chunk=chunk)
    text = prompt(6)
    kept = list(model.logits(text))
    copied = [logits.copy() for _, logits in model.logits(text)]
    for (_, logits), copy in zip(kept, copied, strict=True):
        np.testing.assert_array_equal(logits, copy)
    assert len({logits.ctypes.data for _, logits in kept}) == len(kept) == -(-6 // chunk)
    behind = list(model.logits(text, prompt=2))
    got = np.concatenate([logits for _, logits in behind])
    np.testing.assert_allclose(got, np.concatenate(copied)[2:], atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("step", "says"),
    [(0, "token 7 at position 2 of row 1"), (1, "position 4 of row 1"), (2, "position 5 of row 1")],
)
def test_numbers_that_are_not_finite_name_their_step(
    step: int, says: str, value: float, artifact: Callable[..., Path], monkeypatch: Any
) -> None:
    model = einfold.load(artifact("qwen3"), threads=1)
    real, steps = model.engine.runner.step, []

    def damaged(*arguments: Any) -> Any:
        logits = real(*arguments)
        steps.append(1)
        if len(steps) == step + 1:
            logits[1] = value
        return logits

    monkeypatch.setattr(model.engine.runner, "step", damaged)
    prompts = [[3, 4, 5, 6, 9][: 5 if step else 3], [3, 4, 7] if not step else [3, 4, 5, 7]]
    with pytest.raises(NotFiniteError, match=says):
        model.generate_batch(prompts, max_new_tokens=4, ignore_eos=True)


def test_a_token_that_the_model_rules_out_is_no_fault(
    artifact: Callable[..., Path], monkeypatch: Any
) -> None:
    model = einfold.load(artifact("qwen3"), threads=1)
    real = model.engine.runner.step

    def ruled_out(*arguments: Any) -> Any:
        logits = real(*arguments)
        logits[:, 5:] = -np.inf
        return logits

    monkeypatch.setattr(model.engine.runner, "step", ruled_out)
    assert max(model.generate([3, 4], max_new_tokens=4, ignore_eos=True).tokens) < 5


def test_memory_that_a_step_does_not_get(artifact: Callable[..., Path], monkeypatch: Any) -> None:
    model = einfold.load(artifact("qwen3"), threads=1)

    def refused(*arguments: Any) -> Any:
        raise RuntimeError("Non-zero status code: Failed to allocate memory for requested buffer")

    monkeypatch.setattr(model.engine.runner, "step", refused)
    with pytest.raises(OutOfMemoryError):
        model.generate([3, 4], max_new_tokens=4)


def test_no_prompts_give_no_answers(artifact: Callable[..., Path]) -> None:
    model = einfold.load(artifact("qwen3"), threads=1)
    assert model.generate_batch([]) == []
    assert [one.tokens for one in model.generate_batch([[3], [4]], max_new_tokens=0)] == [[], []]
