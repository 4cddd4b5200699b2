"""Passes that pack the cache: what they write, what they refuse, and whole models that run packed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einfold
from einfold.compiler.ir.kv.keep.full import Full
from einfold.compiler.ir.kv.keep.window import Window
from einfold.compiler.ir.kv.layout import CacheLayout
from einfold.compiler.ir.parser import parse
from einfold.compiler.ir.printer import print_program
from einfold.compiler.ir.verifier import verify
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.cache_methods import FAMILIES
from einfold.compiler.recipe import Recipe
from einfold.errors import IRError, RecipeError

from .. import models
from ..methods import chosen
from ..programs import calls, program
from ..quick import quick

BODY = """
    input %ids "input_ids" : i64[B, S]
    input %q "q" : f32[B, S, 4, 8]
    input %k "k" : f32[B, S, 2, 8]
    call %o = einfold.attention(%q, %k, %k, none, 3, 0.25, WINDOW, 0.0) : f32[B, S, 4, 8]
    output "o" = %o
"""

PASSES = [
    (
        chosen("kivi", group=8, residual=8, slack=4),
        "kivi(residual=8,slack=4,prefill=exact,sinks=4,key_bits=2,value_bits=2,group=8,keys=channel,"
        "rotate=none)",
        # codes of both, then scale and zero of a channel (8 tokens) and of a token
        2 * (8 * 2 / 8 + 8 * 4 / 8 + 8 * 2 / 8 + 4),
    ),
    (
        chosen("turboquant", value_bits=2, group=16, residual=8, slack=4),
        "turboquant(residual=8,slack=4,prefill=exact,sinks=4,key_bits=4,value_bits=2,group=16,"
        "levels=normal)",
        # codes of both, a scale a token of each, the mean of 16 tokens' keys
        2 * (8 * 4 / 8 + 8 * 2 / 8 + 2 + 2 + 8 * 2 / 16),
    ),
    (
        chosen("gear", bits=4, group=8, residual=8, slack=4, tokens=16, rank=1, share=0.2),
        "gear(residual=8,slack=4,prefill=exact,sinks=4,key_bits=4,value_bits=4,group=8,keys=channel,"
        "rotate=none,tokens=16,rank=1,share=0.2)",
        # KIVI's, then left and right of both, then outliers: 4 of a channel's 16, 2 of a token's 8
        2 * (4 + 4 + 4 + 4 + 2 * (2 + 8 * 2 / 16) + (4 * 8 / 16 + 2) * 3),
    ),
    (
        chosen("zipcache", share=0.5, tokens=16, slack=4),
        "zipcache(residual=0,slack=4,prefill=exact,sinks=4,high=4,low=2,salient=8,tokens=16)",
        # 3 bits each in the mean, two scales and zeros a channel, one a token, and the norms
        2 * (6 + 2 * 8 * 4 / 16 + 4 + 8 * 2 / 16),
    ),
    (
        chosen("mikv", share=0.5, group=8, tokens=16, slack=4),
        "mikv(residual=32,slack=4,prefill=exact,sinks=4,high=8,low=2,salient=8,tokens=16,group=8)",
        2 * (10 + 2 * 4 + 8 * 2 / 16),
    ),
    (
        chosen("abq", key_bits=6, block=4, slack=4),
        "abq(residual=0,slack=4,prefill=exact,sinks=4,key_bits=6,value_bits=4,block=4,order=keys,"
        "tokens=16)",
        # mantissas of both, an exponent for each 4 channels
        2 * (8 * 6 / 8 + 8 * 4 / 8 + 2 + 2),
    ),
    (
        chosen("mustafar", value_sparsity=0.7, slack=4, residual=4),
        "mustafar(residual=4,slack=4,prefill=exact,sinks=4,key_sparsity=0.5,value_sparsity=0.7,dtype=f16,"
        "tokens=16)",
        # a bit a channel of both, and half of a key's and the largest two of a value's numbers
        2 * (1 + 1 + 4 * 2 + 2 * 2),
    ),
]


def planned(window: int = 0) -> Any:
    found = program(BODY.replace("WINDOW", str(window)))
    PlanCache().run(found)
    return found


@pytest.mark.parametrize(("step", "storage", "each"), PASSES, ids=lambda x: getattr(x, "name", ""))
def test_the_layout_says_what_is_packed(step: Any, storage: str, each: float) -> None:
    found = planned()
    result = step.run(found)
    assert list(found.layout.lines()) == [
        f"cache 3.0 heads=0,1 of=2 key=8 value=8 policy=full storage={storage}"
    ]
    assert result.notes[0].what.startswith(f"heads 0,1: {each:g} bytes a packed token, from 128;")
    AttachCache().run(found)
    verify(found, deep=True)
    (call,) = [c for c in calls(found) if "attention" in c]
    bulk = [b.name for b in found.layout.buffers(1, 64) if b.role == "read"]
    listed = ", ".join(f"%{name}" for name in bulk)
    given = "%1, %2, %3" if step.storage.rotated else "%q, %k, %k"
    given = "%3, %6, %k" if step.storage.ordered else given
    assert call == (
        f"einfold.packed_attention({given}, %cache.3.0.key, %cache.3.0.value, %slots.0, %packed.0, "
        f'[{listed}], none, none, none, none, 3, 0.25, 0.0, false, "{storage}")'
    )
    queries = ["query.3.0"] if step.name in ("zipcache", "mikv") else []
    assert found.output_names() == ["o", *queries, "cache.3.0.key", "cache.3.0.value"]
    text = print_program(found)
    assert print_program(parse(text)) == text


def test_every_method_is_listed() -> None:
    assert list(FAMILIES["quant"]) == [
        "kivi",
        "turboquant",
        "gear",
        "zipcache",
        "mikv",
        "abq",
        "mustafar",
    ]
    assert [step.name for step, _, _ in PASSES] == list(FAMILIES["quant"])


def test_layers_and_groups_that_keep_few_tokens_stay_as_they_are() -> None:
    found = planned(window=5)
    result = chosen("kivi", group=8, residual=8, slack=4).run(found)
    assert result.notes[0].what == "has a sliding window of 5 tokens of its own"
    assert not result.changed and not found.layout.packs()
    found = planned()
    layer = found.layout[3]
    first, second = (type(layer.groups[0])((head,)) for head in (0, 1))
    groups = (type(first)((0,), Full()), type(first)((1,), Window(4, 16)))
    found.layout = CacheLayout((type(layer)(3, 2, 8, 8, groups),))
    result = chosen("kivi", group=8, residual=8, slack=4).run(found)
    assert [group.packed for group in found.layout[3].groups] == [True, False]
    assert result.notes[1].what == "heads 1 keep few tokens already, by window"
    AttachCache().run(found)
    verify(found, deep=True)
    names = [c.split("(")[0] for c in calls(found) if "attention" in c]
    assert names == ["einfold.packed_attention", "einfold.cached_attention"]
    assert first.packed is second.packed is False


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda: chosen("mustafar", sparsity=0.0), "a sparsity is between 0 and 1, not 0.0"),
        (
            lambda: chosen("mustafar", key_sparsity=float("nan")),
            "a sparsity is between 0 and 1, not nan",
        ),
        (lambda: chosen("abq", bits=5), "codes of 3, 4, 6, 8 bits, not 5"),
        (
            lambda: chosen("abq", slack=4).run(planned()),
            "cache.quant, layer 3: abq: a block of 16 does not divide the key size of a head, 8",
        ),
        (lambda: chosen("kivi", bits=5), "codes of 2, 3, 4, 8 bits, not 5"),
        (
            lambda: chosen("kivi", residual=16),
            "residual of 16 tokens is smaller than a group of 32",
        ),
        (lambda: chosen("gear", group=24, tokens=64), "group of 24 does not divide the granule 64"),
        (lambda: chosen("zipcache", share=1.0), "fewer salient than all"),
        (lambda: chosen("mikv", share=0.01), "not 0 of 128; change tokens, or the share"),
        (
            lambda: chosen("zipcache", share=float("inf")),
            "share of salient tokens is from 0 to 1, not inf",
        ),
        (
            lambda: chosen("mikv", share=float("nan")),
            "share of salient tokens is from 0 to 1, not nan",
        ),
        (
            lambda: chosen("zipcache", high=2, low=4),
            "salient tokens get as many bits as the rest or more, not 2",
        ),
        (
            lambda: chosen("kivi", rotate="all"),
            "kivi: rotate is one of none, keys, values, both, not 'all'",
        ),
        (lambda: chosen("kivi", key_bits=0), "codes of 2, 3, 4, 8 bits, not 0"),
        (lambda: chosen("kivi", value_bits=0), "codes of 2, 3, 4, 8 bits, not 0"),
        (
            lambda: chosen("kivi", group=16, residual=16, slack=4).run(planned()),
            "16 does not divide the value size",
        ),
        (
            lambda: chosen("gear", group=8, residual=8, slack=4, tokens=16, rank=9).run(planned()),
            "rank 9",
        ),
        (lambda: chosen("kivi", group=8, residual=60).run(planned()), "the context has 64"),
        (
            lambda: chosen("kivi", group=8, residual=8, slack=49).run(planned()),
            "12 tokens and up to 56 that wait",
        ),
    ],
)
def test_nonsense_is_refused(step: Callable[[], Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        step()


@pytest.mark.parametrize("target", ["onnx", "reference"])
def test_a_recipe_says_where_packed_tokens_can_be_read(target: str) -> None:
    data: dict[str, Any] = {"target": target, "cache": {"quant": "kivi"}}
    if target == "onnx":
        with pytest.raises(RecipeError, match="only widen all of the cache at every step"):
            Recipe.build(data)
        return
    assert Recipe.build(data).cache.quant["bits"] == 2  # type: ignore[index]
    data["cache"]["storage"] = "int8"
    with pytest.raises(RecipeError, match="both say how tokens are stored"):
        Recipe.build(data)


def test_a_bulk_of_another_storage_is_refused() -> None:
    found = planned()
    chosen("kivi", group=8, residual=8, slack=4).run(found)
    AttachCache().run(found)
    text = print_program(found)
    with pytest.raises(IRError, match="does not hold the pieces"):
        parse(
            text.replace(
                'none, 3, 0.25, 0.0, false, "kivi(residual=8,slack=4,prefill=exact,sinks=4,key_bits=2',
                'none, 3, 0.25, 0.0, false, "kivi(residual=8,slack=4,prefill=exact,sinks=4,key_bits=4',
            )
        )
    other = parse(text.replace('false, "kivi(residual=8', 'false, "kivi(residual=9'))
    with pytest.raises(IRError, match="but the cache layout says kivi"):
        verify(other)


METHODS: dict[str, dict[str, Any]] = {
    "kivi": {"bits": 8, "group": 8, "residual": 8, "slack": 8},
    "turboquant": {"bits": 8, "group": 16, "residual": 8, "slack": 8},
    "gear": {"bits": 8, "group": 8, "residual": 8, "slack": 8, "tokens": 8},
    "zipcache": {"high": 8, "low": 8, "tokens": 16, "slack": 8},
    "mikv": {"low": 8, "tokens": 16, "group": 8, "residual": 0, "slack": 8, "share": 0.5},
    "abq": {"bits": 8, "block": 8, "order": "both", "tokens": 4, "slack": 8},
    "mustafar": {"sparsity": 0.01, "dtype": "i8", "tokens": 4, "residual": 8, "slack": 8},
}


@pytest.mark.parametrize(
    ("method", "prefill"),
    quick(
        product(METHODS, ["exact", "streaming"]),
        ("kivi", "exact"),
        ("mikv", "streaming"),
        ("abq", "exact"),
    ),
)
def test_a_model_over_8_bits_says_nearly_the_same(
    method: str,
    prefill: str,
    model_folder: Callable[[str], Path],
    artifact: Callable[..., Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    table = {"method": method, "prefill": prefill, **METHODS[method]}
    recipe = {"target": "reference", "cache": {"quant": table}}
    einfold.compile(model_folder("llama"), out, recipe=recipe)
    small = einfold.load(out, chunk=16)
    exact = einfold.load(artifact("llama"), threads=1)
    tokens = np.random.default_rng(0).integers(3, models.VOCABULARY, 70).tolist()
    want = np.concatenate([x.copy() for _, x in exact.logits(tokens)])
    got = np.concatenate([x.copy() for _, x in small.logits(tokens, 50)])
    if prefill == "streaming":
        streamed = np.concatenate([x.copy() for _, x in small.logits(tokens)])
        assert np.abs(streamed - want).max() < 0.05 * np.abs(want).max()
    error = np.abs(got - want[-len(got) :]).max() / np.abs(want).max()
    assert 1e-7 < error < 0.05
    cache = small.engine.cache
    assert cache is not None
    packed, slots = int(cache.packed["packed.0"][0]), int(cache.clocks["slots.0"][0])
    assert packed >= 32 and packed + slots == 70
    # Rows of a batch pack by their own lengths.
    alone = small.generate(tokens[:40], max_new_tokens=6, ignore_eos=True).tokens
    rows = small.generate_batch([tokens[:40], tokens[:9]], max_new_tokens=6, ignore_eos=True)
    assert rows[0].tokens == alone
    assert len(rows[1].tokens) == 6
