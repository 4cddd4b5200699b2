"""Copies of a cache are independent of it, however they were made, and rows move as transformers asks."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import einfold
from einfold.errors import UnsupportedError

from .. import models
from ..quick import quick

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "int8": {"cache": "int8"},
    "window": {"prune": "streaming_llm:sinks=2,recent=9,slack=5"},
    "compensation": {"prune": "razor_attention:sinks=2,recent=9,slack=5"},
    "scores": {"prune": "h2o:tokens=13,recent=6,slack=4"},
    "votes": {"prune": "snapkv:tokens=16,observe=6,slack=4"},
    "expected": {"prune": "expected_attention:tokens=16,recent=6,slack=4"},
    "kivi": {"quant": "kivi:bits=4,group=8,residual=8,slack=8,rotate=both"},
    "cskv": {"share": "cskv:recent=8,slack=4"},
    "anchors": {"prune": "elastic_cache:tokens=16,offset=6,slack=4"},
}

WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "deepcopy of a pickle": lambda cache: copy.deepcopy(pickle.loads(pickle.dumps(cache))),
}

PREFIX = torch.arange(3, 33)[None]
QUESTIONS = [torch.arange(40, 46)[None], torch.arange(60, 66)[None]]


@pytest.fixture(scope="module")
def model() -> Any:
    return models.build("llama")


def answer(model: Any, cache: Any, question: torch.Tensor) -> list[int]:
    text = torch.cat((PREFIX, question), 1)
    with torch.no_grad():
        out = model.generate(
            text,
            past_key_values=cache,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, text.shape[1] :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", quick(METHODS, *list(METHODS)[::4]))
def test_a_prefix_that_prompts_share(name: str, model: Any) -> None:
    """transformers' own recipe: the prefix is read once, and each prompt goes on from a copy."""
    with einfold.cache_for(model, **METHODS[name]) as cache, torch.no_grad():
        alone = []
        for question in QUESTIONS:
            cache.reset()
            model(PREFIX, past_key_values=cache)
            alone.append(answer(model, cache, question))
        cache.reset()
        model(PREFIX, past_key_values=cache)
        held = cache.nbytes
        for way in WAYS.values():
            copies = [way(cache) for _ in QUESTIONS]
            assert [answer(model, c, q) for c, q in zip(copies, QUESTIONS, strict=True)] == alone
            assert all(c.nbytes == c.layout.bytes(1, c.capacity) for c in copies)
        assert cache.nbytes == held and cache.get_seq_length() == PREFIX.shape[1]
        assert answer(model, cache, QUESTIONS[0]) == alone[0]
    if name == "full":
        want = DynamicCache(config=model.config)
        with torch.no_grad():
            model(PREFIX, past_key_values=want)
        assert answer(model, copy.deepcopy(want), QUESTIONS[0]) == alone[0]


def test_a_copy_does_not_keep_the_attention_function_and_can_be_attached(model: Any) -> None:
    before = model.config._attn_implementation
    with einfold.cache_for(model) as cache, torch.no_grad():
        model(PREFIX, past_key_values=cache)
        want = answer(model, copy.deepcopy(cache), QUESTIONS[0])
        with copy.deepcopy(cache) as inner:
            assert answer(model, inner, QUESTIONS[0]) == want
        kept = copy.deepcopy(cache)
        shallow = copy.copy(cache)
    assert model.config._attn_implementation == before
    with pytest.raises(UnsupportedError, match="before release"):
        answer(model, copy.deepcopy(kept), QUESTIONS[0])
    kept.attach(model)
    assert answer(model, kept, QUESTIONS[0]) == want
    kept.release()
    assert model.config._attn_implementation == before
    assert shallow.layers[0] is cache.layers[0] and shallow.handle != cache.handle
    with pytest.raises(UnsupportedError, match="the cache has 2 layers and the model 3"):
        kept.attach(models.build("llama", num_hidden_layers=3))


@pytest.mark.slow
def test_a_pickle_is_read_by_another_process(model: Any, tmp_path: Path) -> None:
    with einfold.cache_for(model, **METHODS["int8"]) as cache, torch.no_grad():
        model(PREFIX, past_key_values=cache)
        (tmp_path / "cache").write_bytes(pickle.dumps(cache))
        want = answer(model, cache, QUESTIONS[0])
    model.save_pretrained(tmp_path / "model")
    script = f"""
import pickle, torch
from transformers import AutoModelForCausalLM
from tests.bridge.test_copies import QUESTIONS, answer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}).eval()
cache = pickle.loads(open({str(tmp_path / "cache")!r}, "rb").read())
cache.attach(model)
print(answer(model, cache, QUESTIONS[0]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == str(want)


def test_a_cache_that_is_let_go_of_gives_the_attention_back(model: Any) -> None:
    before = model.config._attn_implementation
    answer(model, einfold.cache_for(model), QUESTIONS[0])
    gc.collect()
    assert model.config._attn_implementation == before
    first, second = einfold.cache_for(model), einfold.cache_for(model)
    first.release()
    first.release()
    assert model.config._attn_implementation != before
    second.release()
    assert model.config._attn_implementation == before


def test_rows_are_repeated_and_chosen_with_their_masks(model: Any) -> None:
    """`batch_repeat_interleave` and `batch_select_indices`, of rows that are padded, as transformers' own."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    ids, rows = torch.arange(5, 29).reshape(2, 12), torch.tensor([3, 0, 2])

    def run(cache: Any) -> torch.Tensor:
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(rows)
            chosen = torch.cat((mask.repeat_interleave(2, 0)[rows], mask.new_ones(3, 1)), 1)
            at = chosen.sum(1, keepdim=True) - 1
            step = model(
                torch.tensor([[7]] * 3),
                attention_mask=chosen,
                position_ids=at,
                past_key_values=cache,
            )
        logits: torch.Tensor = step.logits
        return logits

    want = run(DynamicCache(config=model.config))
    with einfold.cache_for(model) as cache:
        torch.testing.assert_close(run(cache), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "new"), [(0, 5), (2, 0), (0, 0)])
def test_no_rows_and_no_tokens_give_none(rows: int, new: int, model: Any) -> None:
    """Asked of a layer: most models of transformers cannot shape their own tensors then."""
    with einfold.cache_for(model) as cache:
        query, keys = torch.zeros(rows, new, 4, 16), torch.zeros(rows, new, 2, 16)
        assert cache.layers[0].attend(query, keys, keys, None, None).shape == (rows, new, 4, 16)
        assert cache.nbytes == 0 and cache.get_seq_length() == new
        assert cache.get_mask_sizes(1, 0) == (1, new)


def test_gradients_are_refused_in_one_sentence(model: Any) -> None:
    with einfold.cache_for(model) as cache:
        logits = model(PREFIX, past_key_values=cache).logits
        with pytest.raises(UnsupportedError, match="gives no gradients"):
            logits.sum().backward()
