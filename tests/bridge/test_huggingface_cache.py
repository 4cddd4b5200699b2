"""einfold's caches in transformers' `generate`, against its own cache and against the reference engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import einfold
from einfold.errors import PromptError, UnsupportedError

from .. import models
from ..quick import quick, rarely

NEW = 14
PROMPTS = (41, 23, 30)

#: Every kind of layout, small enough that tokens leave while the prompt is read and while answers are.
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "f16": {"cache": "f16", "target": "reference"},
    "int8": {"cache": "int8"},
    "int4": {"cache": "int4"},
    "window": {"prune": "streaming_llm:sinks=2,recent=9,slack=5"},
    "window, streaming": {"prune": "streaming_llm:sinks=2,recent=9,slack=5,prefill=streaming"},
    "window, int8": {"cache": "int8", "prune": "streaming_llm:sinks=2,recent=9,slack=5"},
    "compensation, int4": {"cache": "int4", "prune": "razor_attention:sinks=2,recent=9,slack=5"},
    "scores, int4": {"cache": "int4", "prune": "h2o:tokens=13,recent=6,slack=4"},
    "compensation": {"prune": "razor_attention:sinks=2,recent=9,slack=5"},
    "compensation, streaming": {
        "prune": "razor_attention:sinks=2,recent=9,slack=5,prefill=streaming"
    },
    "scores": {"prune": "h2o:tokens=13,recent=6,slack=4"},
    "votes": {"prune": "snapkv:tokens=16,observe=6,slack=4"},
    "votes for others": {"prune": "kvcrush:tokens=16,observe=6,slack=4,share=0.5"},
    "anchors": {"prune": "elastic_cache:tokens=16,offset=6,slack=4"},
}

#: Those that pack, of which onnxruntime takes none.
PACKED: dict[str, dict[str, Any]] = {
    name: {"quant": f"{name}:{options}", "target": "reference"}
    for name, options in {
        "kivi": "bits=4,group=8,residual=8,slack=8",
        "gear": "bits=4,group=8,tokens=16,residual=8,slack=8",
        "zipcache": "tokens=16,slack=8",
        "mikv": "share=0.5,group=8,tokens=16,residual=8,slack=8",
        "mustafar": "tokens=8,slack=8,residual=8",
        "abq": "tokens=8,slack=8,block=8",
    }.items()
}
PACKED["cskv"] = {"share": "cskv", "target": "reference"}


@pytest.fixture(scope="module")
def model(text_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(text_model).eval()


@pytest.fixture
def cache_for(model: Any) -> Iterator[Callable[..., Any]]:
    made = []

    def get(**options: Any) -> Any:
        made.append(einfold.cache_for(model, **options))
        return made[-1]

    yield get
    for cache in made:
        cache.release()


def rows(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 300, (n,), generator=generator).tolist() for n in PROMPTS[:count]]


def left_padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(row)) + row for row in prompts]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generate(
    model: Any, prompts: list[list[int]], new: int = NEW, **options: Any
) -> list[list[int]]:
    inputs = left_padded(prompts)
    out = model.generate(
        **inputs, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    return out[:, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", [1, 3])
def test_a_full_cache_is_transformers_own(model: Any, cache_for: Any, count: int) -> None:
    prompts = rows(count)
    want = generate(model, prompts)
    cache = cache_for()
    assert generate(model, prompts, past_key_values=cache) == want
    assert cache.get_seq_length() == max(map(len, prompts)) + NEW - 1
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    inputs = left_padded(prompts)
    got = model(**inputs, past_key_values=cache).logits
    cache.release()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], model(**inputs).logits[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", quick(METHODS | PACKED, "window, streaming", "scores", "kivi"))
def test_tokens_are_the_reference_engines(
    name: str, model: Any, cache_for: Any, text_model: Path, tmp_path: Path
) -> None:
    options, prompts = {"cache": "f32"} | (METHODS | PACKED)[name], rows(3)
    einfold.compile(text_model, tmp_path / "a", check=False, **options)
    options.pop("target", None)
    reference = einfold.load(tmp_path / "a", engine="reference")
    want = [
        r.tokens for r in reference.generate_batch(prompts, max_new_tokens=NEW, ignore_eos=True)
    ]
    from transformers import AutoTokenizer

    cache = cache_for(**options, tokenizer=AutoTokenizer.from_pretrained(text_model))
    assert generate(model, prompts, past_key_values=cache) == want
    assert cache.nbytes == cache.layout.bytes(3, cache.capacity)
    cache.reset()
    assert generate(model, prompts[1:2], past_key_values=cache) == want[1:2]


@pytest.mark.parametrize("share", ["cross_layer:layers=1,threshold=-1", "minicache"])
def test_layers_that_share_are_refused(share: str) -> None:
    with pytest.raises(UnsupportedError, match="each layer must keep its own cache"):
        einfold.cache_for(models.build("llama", num_hidden_layers=4), share=share)


def test_what_is_stored_and_what_was_seen(model: Any, cache_for: Any) -> None:
    cache = cache_for(**METHODS["window"])
    generate(model, rows(1), new=2, past_key_values=cache)
    seen, stored = PROMPTS[0] + 1, 2 + 9 + 1
    assert cache.get_seq_length() == seen
    assert cache.get_mask_sizes(1, 0) == (stored + 1, seen - stored)
    assert not cache.is_compileable


@pytest.mark.parametrize("name", [rarely("gemma3"), "gpt_oss", rarely("qwen3")])
def test_other_architectures(name: str) -> None:
    model = models.build(name)
    prompts = [[token % 128 for token in row] for row in rows(3)]
    want = generate(model, prompts)
    with einfold.cache_for(model) as cache:
        assert generate(model, prompts, past_key_values=cache) == want
    assert generate(model, prompts) == want


def test_beams_reorder_the_rows(model: Any, cache_for: Any) -> None:
    want = generate(model, rows(2), num_beams=3)
    assert generate(model, rows(2), num_beams=3, past_key_values=cache_for()) == want


def test_crop(model: Any, cache_for: Any) -> None:
    ids = torch.tensor(rows(1))
    cache = cache_for()
    want = model(ids, past_key_values=cache).logits
    cache.crop(-10)
    assert cache.get_seq_length() == ids.shape[1] - 10
    got = model(ids[:, -10:], past_key_values=cache).logits
    torch.testing.assert_close(got, want[:, -10:], rtol=1e-4, atol=1e-4)
    pruned = cache_for(**METHODS["window"])
    model(ids, past_key_values=pruned)
    with pytest.raises(UnsupportedError, match="cannot bring back tokens"):
        pruned.crop(-1)


def test_crop_of_more_than_a_row_has(model: Any, cache_for: Any) -> None:
    """The newest tokens of a padded row end where its padding begins."""
    inputs = left_padded(rows(2))
    longest, real = inputs["input_ids"].shape[1], inputs["attention_mask"].sum(1).tolist()
    cache, fresh = cache_for(), cache_for()
    model(**inputs, past_key_values=cache)
    left = longest - min(real) - 1
    cache.crop(left - longest)
    assert cache.get_seq_length() == left
    for layer in cache.layers:
        assert layer.cache.lengths.tolist() == [max(0, n - longest + left) for n in real]
        assert layer.cache.lengths.min() == 0
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    again = model(**inputs, past_key_values=cache).logits
    want = model(**inputs, past_key_values=fresh).logits
    torch.testing.assert_close(again, want)


def test_the_attention_function_is_installed_and_given_back(model: Any) -> None:
    ids, before = torch.tensor(rows(1)), model.config._attn_implementation
    with einfold.cache_for(model), einfold.cache_for(model) as cache:
        assert model.config._attn_implementation == "einfold_cache"
        with pytest.raises(UnsupportedError, match="brings none"):
            model(ids)
        with pytest.raises(UnsupportedError, match="adds numbers to scores"):
            model(ids, past_key_values=cache, attention_mask=torch.ones(1, 1, 41, 41))
    assert model.config._attn_implementation == before


def test_a_model_that_the_cache_was_not_made_for(model: Any, cache_for: Any) -> None:
    ids = torch.tensor(rows(1))
    other = models.build("llama", vocab_size=300)
    cache = cache_for()
    with pytest.raises(UnsupportedError, match="give it to the model that cache_for made it for"):
        other(ids, past_key_values=cache)
    cache.release()
    with pytest.raises(UnsupportedError, match="before release"):
        model(ids, past_key_values=cache)


def test_what_does_not_fit_is_refused(model: Any, cache_for: Any) -> None:
    ids = torch.tensor(rows(1))
    small = cache_for(context=30)
    with pytest.raises(PromptError, match="41 tokens do not fit the context of 30"):
        model(ids, past_key_values=small)
    cache = cache_for()
    model(ids, past_key_values=cache)
    with pytest.raises(PromptError, match="a batch of 2 does not go into a cache of 1 rows"):
        model(ids.expand(2, -1), past_key_values=cache)


@pytest.mark.parametrize("backend", ["einfold", rarely("inductor")])
@pytest.mark.parametrize("name", [rarely("full"), "compensation"])
def test_under_torch_compile_without_a_graph_break(
    backend: str, name: str, text_model: Path
) -> None:
    from torch._dynamo.utils import counters

    model = AutoModelForCausalLM.from_pretrained(text_model).eval()
    cache = einfold.cache_for(model, **METHODS[name])
    want = generate(model, rows(3), past_key_values=cache)
    cache.reset()
    torch._dynamo.reset()
    counters.clear()
    model.compile(backend=backend)
    assert generate(model, rows(3), past_key_values=cache) == want
    assert not counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
    torch._dynamo.reset()
