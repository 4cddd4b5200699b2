"""Memory is taken as the text grows: to the byte as the layout accounts, and less than transformers takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import einfold
from einfold.compiler.ir.interpreter import Run
from einfold.compiler.ir.kv.keep.full import Full
from einfold.compiler.ir.kv.keep.heavy_hitters import HeavyHitters
from einfold.compiler.ir.kv.keep.matched import Matched
from einfold.compiler.ir.kv.keep.policy import Policy
from einfold.compiler.ir.kv.keep.window import Window
from einfold.compiler.ir.kv.layout import CacheLayout, HeadGroup, LayerCache
from einfold.compiler.ir.kv.store.kivi.storage import Kivi
from einfold.compiler.ir.kv.store.low_rank.storage import LowRank
from einfold.compiler.ir.kv.store.plain.storage import Plain
from einfold.compiler.ir.kv.store.storage import Storage
from einfold.huggingface_layer import STEP, grown
from einfold.runtime.cache import Cache

from .. import models
from ..quick import rarely

CONTEXT = 640

LAYOUTS: dict[str, tuple[Policy, Storage]] = {
    "full": (Full(), Plain()),
    "int8": (Full(), Plain("i8", "channel")),
    "int4": (Full(), Plain("i4", "channel")),
    "f16": (Full(), Plain("f16")),
    "window": (Window(2, 30, 8, True, "streaming"), Plain()),
    "scores": (HeavyHitters(20, 30, 8, "streaming"), Plain()),
    "threshold": (Matched(20, 30, 8, "streaming"), Plain()),
    "packed": (Full(), Kivi(8, 8, "streaming", 4, 2, 2, 8)),
    "features": (Window(2, 30, 8, False, "streaming"), LowRank(4, 4)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_growing_keeps_what_is_held_and_takes_what_the_account_says(name: str) -> None:
    policy, storage = LAYOUTS[name]
    group = HeadGroup((0, 1), policy, storage)
    layout = CacheLayout((LayerCache(0, 2, 8, 8, (group,)),))
    cache = Cache.allocate(layout, 2, 16)
    generator = np.random.default_rng(0)
    for buffer in cache.buffers.values():
        buffer[...] = generator.integers(1, 100, buffer.shape)
    before = {buffer: held.copy() for buffer, held in cache.buffers.items()}
    cache.grow(200)
    assert cache.nbytes == layout.bytes(2, 200) == Cache.allocate(layout, 2, 200).nbytes
    for buffer, held in before.items():
        kept = cache.buffers[buffer][tuple(slice(0, size) for size in held.shape)]
        np.testing.assert_array_equal(kept, held)
    cache.grow(100)
    assert cache.capacity == 200


@pytest.mark.parametrize(
    ("capacity", "needed", "room"),
    [(0, 1, 64), (0, 64, 64), (0, 65, 128), (64, 65, 128), (1024, 1025, 1152), (64, 900, 640)],
)
def test_steps(capacity: int, needed: int, room: int) -> None:
    assert grown(capacity, needed, CONTEXT if needed == 900 else 1 << 20) == room


@pytest.fixture(scope="module")
def model() -> Any:
    return models.build("llama", max_position_embeddings=CONTEXT)


METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    # In float32: float16 rounds what differs in the last bit to numbers that differ by far more.
    "razor": {"prune": "razor_attention:recent=100,slack=16", "cache": "f32"},
    "h2o": {"prune": "h2o:tokens=100,recent=40,slack=16", "cache": "f32"},
    "kivi": {"quant": "kivi:group=8,residual=32,slack=32"},
    "cskv": {"share": "cskv:recent=40"},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_growing_cache_answers_as_one_of_the_whole_context(
    name: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(330)[None] % 90 + 3

    def run(start: int) -> tuple[torch.Tensor, list[int]]:
        with einfold.cache_for(model, **METHODS[name]) as cache, torch.no_grad():
            rooms, logits, at = [], [], 0
            for size in (start, 1, 1, 80, 150, 1):
                step = model(ids[:, at : at + size], past_key_values=cache)
                at, _ = at + size, logits.append(step.logits)
                rooms.append(cache.capacity)
                assert cache.nbytes == cache.layout.bytes(1, cache.capacity)
            return torch.cat(logits, 1), rooms

    got, rooms = run(63)
    assert rooms[0] == rooms[1] == STEP < rooms[-1] < CONTEXT
    monkeypatch.setattr(
        "einfold.huggingface_layer.grown", lambda capacity, needed, context: context
    )
    want, rooms = run(63)
    assert set(rooms) == {CONTEXT}
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def transformers_bytes(model: Any, ids: torch.Tensor) -> int:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("tokens", [200, 1000])
def test_the_snippet_of_the_readme_takes_less_than_transformers_own_cache(tokens: int) -> None:
    """`einfold.cache_for(hf_model, prune="razor_attention")`, of a model made for a long context."""
    model = models.build("llama", max_position_embeddings=8192, num_hidden_layers=2)
    ids = torch.arange(tokens)[None] % 90 + 3
    with einfold.cache_for(model, prune="razor_attention") as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        assert cache.nbytes == cache.layout.bytes(1, cache.capacity)
    assert cache.nbytes < 0.7 * transformers_bytes(model, ids)


@pytest.mark.parametrize(
    ("dtype", "options", "stored"),
    [
        (torch.float32, {}, "f32"),
        (torch.float32, {"prune": "razor_attention:recent=100"}, "f16"),
        rarely(torch.float32, {"prune": "razor_attention:recent=100", "cache": "f32"}, "f32"),
        (torch.float32, {"recipe": {"cache": {"storage": "f16"}}}, "f16"),
        (torch.float16, {}, "f16"),
        rarely(torch.bfloat16, {}, "f16"),
        rarely(torch.bfloat16, {"cache": "f32"}, "f32"),
        (torch.bfloat16, {"cache": "int8"}, "i8/channel"),
    ],
)
def test_slots(dtype: torch.dtype, options: dict[str, Any], stored: str) -> None:
    model = models.build("llama", max_position_embeddings=CONTEXT).to(dtype)
    ids = torch.arange(100)[None] % 90 + 3
    with torch.no_grad():
        want = model(ids, past_key_values=DynamicCache(config=model.config)).logits
    with einfold.cache_for(model, **options) as cache, torch.no_grad():
        got = model(ids, past_key_values=cache).logits
        again = model(ids[:, -1:], past_key_values=cache).logits
    assert {group.storage.text for _, _, group in cache.layout.groups()} == {stored}
    assert got.dtype == again.dtype == dtype and bool(torch.isfinite(again).all())
    share = ((got.float() - want.float()).abs().max() / want.float().abs().max()).item()
    bound = {torch.float32: 1e-5 if stored == "f32" else 2e-3, torch.float16: 4e-3}.get(dtype, 3e-2)
    assert share < (5e-2 if stored.startswith("i8") else bound)


def test_what_float16_has_no_room_for_is_cut() -> None:
    from einfold.compiler.ir.ops.attention import write_slots

    slots = torch.zeros(1, 1, 2, 2, dtype=torch.float16)
    new = torch.tensor([1e6, -1e6, 1.0, -0.5]).reshape(1, 2, 1, 2)
    write_slots(slots, new, torch.tensor([[0, 1]]), None)
    assert slots.flatten().tolist() == [65504.0, -65504.0, 1.0, -0.5]


def test_what_was_planned_is_found_again(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process too: what was measured is kept under the name of the weights."""
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path))
    runs: list[str] = []
    begin = Run.__init__

    def counted(self: Run, *arguments: Any) -> None:
        runs.append("")
        begin(self, *arguments)

    monkeypatch.setattr(Run, "__init__", counted)
    with einfold.cache_for(model, prune="razor_attention:recent=100", check=False) as cache:
        want = list(cache.layout.lines())
    assert len(runs) == 1
    with einfold.cache_for(model, prune="razor_attention:recent=100", check=False) as cache:
        assert list(cache.layout.lines()) == want
    assert len(runs) == 1
    other = models.build("llama", seed=1, max_position_embeddings=CONTEXT)
    einfold.cache_for(other, prune="razor_attention:recent=100", check=False).release()
    assert len(runs) == 2
