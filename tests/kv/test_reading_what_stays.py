"""Readers of pages over policies that let go of tokens: statistics follow the slots, on every road."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import einfold
from einfold.compiler.ir.kv.keep.full import Full
from einfold.compiler.ir.kv.keep.policy import POLICIES
from einfold.compiler.ir.kv.keep.voted import Voted
from einfold.compiler.ir.kv.keep.window import Window
from einfold.compiler.ir.kv.layout import BOUNDS, CacheLayout
from einfold.compiler.ir.kv.read.pages.choosing import statistics_of
from einfold.compiler.ir.kv.read.pages.paged import Paged
from einfold.compiler.ir.kv.read.quest.reader import Quest
from einfold.compiler.ir.kv.read.shadowkv.reader import ShadowKV
from einfold.compiler.ir.kv.store.plain.storage import Plain
from einfold.compiler.ir.printer import print_program
from einfold.compiler.ir.verifier import verify
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.recipe import Recipe
from einfold.errors import IRError
from einfold.runtime.buffers import empty
from einfold.runtime.cache import Cache

from .. import models
from . import common
from .test_alike import Tensors
from .test_own import POLICY_OPTIONS
from .test_quest import read

READERS = {
    "quest": Quest(4, 0.25, 12),
    "quest, linear": Quest(4, 0.25, 12, linear=0.6),
    "shadowkv": ShadowKV(4, 0.25, 12, outliers=2),
}
TOKENS = [3 + (7 * place + place * place) % 90 for place in range(100)]


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_numpy_finds_what_torch_finds(reader: Paged, dtype: Any) -> None:
    keys = (40 * np.random.default_rng(0).standard_normal((2, 24, 16))).clip(-128, 127)
    keys = keys.astype(dtype)
    found = reader.numbers_of(keys.reshape(2, 6, 4, 16))
    wanted = statistics_of(reader, torch.from_numpy(keys)[None])[0].numpy()
    assert found.dtype == dtype and found.shape[2] == reader.bound_numbers(16)
    within = {np.float32: 1e-5, np.float16: 0.1, np.int8: 1}[dtype]  # the other side of an edge
    np.testing.assert_allclose(found.astype(float), wanted.astype(float), atol=within)
    assert (found != wanted).mean() < 0.05


@pytest.mark.parametrize("policy", [name for name in POLICY_OPTIONS if name != "window"])
def test_statistics_follow_the_slots_of_every_policy(policy: str) -> None:
    made = POLICIES[policy](**POLICY_OPTIONS[policy])
    check_moves(common.layout_of(made, reader=READERS["quest"]), empty)


@pytest.mark.parametrize("make", [empty, Tensors()], ids=["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "i8"])
@pytest.mark.parametrize("reader", READERS)
def test_statistics_follow_the_slots_of_every_reader(reader: str, dtype: str, make: Any) -> None:
    storage = Plain(dtype, "channel" if dtype == "i8" else "none")
    policy = Voted(tokens=17, observe=4, slack=8, queries=2)
    check_moves(common.layout_of(policy, storage, READERS[reader]), make)
    check_moves(common.layout_of(Window(2, 9, 6), storage, READERS[reader]), make)


def check_moves(layout: CacheLayout, make: Callable[..., Any]) -> None:
    """Two rows whose prompts are read in steps; after each step statistics are those of the slots in use."""
    common.check_text(layout)
    cache = Cache.allocate(layout, 2, 90, 40, make)
    assert cache.nbytes == layout.bytes(2, 90, 40)
    random, at = np.random.default_rng(0), 0
    while at < 89:
        size = min(cache.step_limit(), (40 if at < 40 else 89) - at, 3)
        cache.make_room(size)
        write(cache, size, random)
        at += size
        check_statistics(cache)
        if at == 40:
            cache.settle()
            assert cache.nbytes == layout.bytes(2, 90)
            check_statistics(cache)
    left = [cache.counters[layout.clock(group)] for _, _, group in layout.groups()]
    assert all((used < 89).all() for used in left) or layout.layers[0].groups[0].policy == Full()


def write(cache: Cache, size: int, random: np.random.Generator) -> None:
    """As a step of the graph does: new tokens, and the statistics of the pages that they come into."""
    observed = {}
    for layer, index, group in cache.layout.groups():
        used = cache.counters[cache.layout.clock(group)]
        prefix = f"cache.{layer.layer}.{index}"
        for part, width in (("key", common.KEY), ("value", common.VALUE)):
            slots = cache.buffers[f"{prefix}.{part}"]
            for row, first in enumerate(used):
                new = 30 * random.standard_normal((common.HEADS, size, width))
                new = new.clip(-128, 127) if group.storage.slot_dtype == "i8" else new
                torch.as_tensor(slots[row])[:, int(first) : int(first) + size] = torch.as_tensor(
                    new
                ).to(torch.as_tensor(slots).dtype)
        held = [torch.as_tensor(cache.buffers[f"{prefix}.{part}"]) for part in (BOUNDS, "key")]
        group.reader.choosing.refresh(group.reader, *held, torch.as_tensor(used), size)
        shown = (common.HEADS, 1) if group.policy.told else (2 * common.HEADS, common.KEY)
        queries = random.standard_normal((cache.batch, size, *shown))
        shown_BSHD: Any = queries.astype(np.float32)
        tensors = isinstance(cache.buffers[f"{prefix}.key"], torch.Tensor)
        observed[f"query.{layer.layer}.{index}"] = (
            torch.from_numpy(shown_BSHD) if tensors else shown_BSHD
        )
    cache.advance(size, observed)


def check_statistics(cache: Cache) -> None:
    """Those of every page in use are what is found of its slots; the newest token fills up its page."""
    for layer, index, group in cache.layout.groups():
        reader, prefix = group.reader, f"cache.{layer.layer}.{index}"
        assert isinstance(reader, Paged)
        for row, used in enumerate(cache.counters[cache.layout.clock(group)].tolist()):
            slots = np.arange(-(-used // reader.page) * reader.page).clip(max=used - 1)
            keys = torch.as_tensor(cache.buffers[f"{prefix}.key"][row])[:, slots]
            wanted = statistics_of(reader, keys[None])[0].float()
            held = torch.as_tensor(cache.buffers[f"{prefix}.{BOUNDS}"][row]).float()
            # How far keys are apart is 127 times a difference of numbers of about 1.
            within = {"f32": 1e-5, "f16": 0.07, "i8": 1.0}[group.storage.slot_dtype]
            within = max(within, 127 * 2**-20 * reader.widens)
            torch.testing.assert_close(
                held[:, : len(slots) // reader.page], wanted, atol=within, rtol=1e-5
            )


def test_the_graph_names_slots_and_pages_by_their_counter() -> None:
    """A layer whose tokens move and are read by pages, behind one that is read whole."""
    policy = Voted(tokens=33, observe=8, slack=8, queries=2)
    found, notes = read(Quest(4, 0.25, 12, skip_layers=1), policy=policy)
    assert [action for action, _ in notes] == ["skipped", "applied"]
    AttachCache().run(found)
    verify(found, deep=True)
    lines = print_program(found)
    assert '"cache.1.0.bounds" : f32[B, 2, C0P4, 16]' in lines
    assert '"cache.1.0.key" : f32[B, 2, C0, 8]' in lines
    assert found.layout.slot_dims(100) == {"C": 100, "C0": 44, "C0P4": 12}
    assert found.layout.slot_dims(100, 50) == {"C": 100, "C0": 52, "C0P4": 14}


def test_layers_that_are_read_otherwise_have_a_counter_of_their_own() -> None:
    """Their slots do not come in whole pages, and both move by their own."""
    policy = Voted(tokens=17, observe=4, slack=4, queries=2)
    paged, whole = (common.layout_of(policy, reader=each) for each in (READERS["quest"], None))
    layout = CacheLayout((whole.layers[0], paged.layers[1]))
    assert list(layout.clocks()) == ["slots.0", "slots.1"]
    assert layout.slot_dims(100) == {"C": 100, "C0": 21, "C1": 24, "C1P4": 7}


@pytest.mark.parametrize(
    ("policy", "reader", "said"),
    [
        (
            Window(1, 5, 4, compensation=True),
            Quest(),
            "must be of the layer itself, each for one token",
        ),
        (
            Voted(tokens=64),
            Quest(alike=16),
            "puts tokens into an order of its own once, so they must stay",
        ),
    ],
    ids=["compensated", "alike"],
)
def test_what_cannot_be_is_refused(policy: Any, reader: Paged, said: str) -> None:
    with pytest.raises(IRError, match=said):
        common.layout_of(policy, reader=reader)
    lines = list(common.layout_of(Full(), reader=reader).lines())
    policies = [line.replace("policy=full", f"policy={show_of(policy)}") for line in lines]
    with pytest.raises(IRError, match="cannot read the cache line"):
        CacheLayout.parse(policies)


def show_of(policy: Any) -> str:
    (line, *_) = common.layout_of(policy).lines()
    return line.split("policy=")[1].split(" ")[0]


def test_bytes_of_a_step_are_those_of_what_stays() -> None:
    """Of 40 slots 16 are read, and the statistics of 11 pages; whatever the context."""
    layout = common.layout_of(Voted(tokens=32, observe=8, slack=8), reader=Quest(4, 0.25, 16))
    assert layout.read_bytes(1, 1000) == 2 * 2 * 4 * (24 * 16 + 32 * 11)


CACHE = {
    "prune": {"method": "snapkv", "tokens": 40, "observe": 8, "slack": 8},
    "read": {"method": "quest", "page": 4, "share": 0.25, "tokens": 12, "skip_layers": 0},
}


@pytest.mark.parametrize("storage", ["f32", "int8"])
@pytest.mark.parametrize("linear", [0.0, 0.6])
def test_onnx_reads_of_what_stays_what_the_reference_chooses(
    storage: str, linear: float, tmp_path: Path
) -> None:
    """Token by token behind a prompt that is longer than what stays, until tokens have moved again."""
    table = CACHE | {"storage": storage, "read": CACHE["read"] | {"linear": linear}}
    folder = models.save("llama", tmp_path / "model")
    einfold.compile(folder, tmp_path / "a", recipe={"target": "onnx", "cache": table})
    whole = {"storage": storage, "prune": CACHE["prune"]}
    einfold.compile(folder, tmp_path / "b", recipe={"target": "onnx", "cache": whole}, check=False)
    found = [
        logits(tmp_path / name, target)
        for name, target in (("a", "reference"), ("a", "onnx"), ("b", "onnx"))
    ]
    within = 1e-4 if storage == "f32" else 2e-3
    np.testing.assert_allclose(found[1], found[0], atol=within * np.abs(found[0]).max())
    assert np.abs(found[2] - found[1]).max() > 1e-3  # fewer are read than stay


def logits(folder: Path, target: str) -> Any:
    """Behind each of 30 tokens that follow a prompt of 70, which both read by the target onnx."""
    first = einfold.load(folder, threads=1).engine
    engine = einfold.load(folder, engine=target, threads=1).engine
    cache = first.allocate(1, 100, 70)
    first.prefill(cache, [np.array(TOKENS[:70])])
    found = []
    for place in range(70, 100):
        cache.make_room(1)
        ids, positions = np.array([[TOKENS[place]]]), np.array([[place]])
        found.append(engine.step(cache, ids, positions, np.zeros(1, np.int64)).copy())
        cache.advance(1)
    return np.concatenate(found)


#: Room for all that is written here, of which a query reads 70 tokens: all that there are until then.
ROOMY = {
    "prune": CACHE["prune"] | {"slack": 40},
    "read": CACHE["read"] | {"tokens": 70},
}


@pytest.mark.parametrize("target", ["reference", "onnx"])
def test_reading_all_that_stays_is_reading_it_whole(target: str, tmp_path: Path) -> None:
    folder = models.save("llama", tmp_path / "model")
    for name, table in (("a", ROOMY), ("b", {"prune": ROOMY["prune"]})):
        recipe = {"target": "onnx", "cache": table}
        einfold.compile(folder, tmp_path / name, recipe=recipe, check=False)
    paged, plain = (logits(tmp_path / name, target) for name in ("a", "b"))
    np.testing.assert_allclose(paged, plain, atol=1e-4 * np.abs(plain).max())


def test_a_cache_for_transformers_reads_of_what_stays() -> None:
    model = models.build("llama")
    ids = torch.tensor([TOKENS[:70]])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    found = []
    for table in (ROOMY, {"prune": ROOMY["prune"]}):
        with einfold.cache_for(model, {"cache": table}, context=128, check=False) as cache:
            found.append(model.generate(ids, past_key_values=cache, **options).tolist())
            held = sum(int(each.layout.bytes(1, cache.capacity)) for each in cache.layers)
            assert cache.nbytes == held
    assert found[0] == found[1]


def test_the_recipe_has_both() -> None:
    recipe = Recipe.read(Path(einfold.__file__).parent / "recipes" / "mpcache.toml")
    assert recipe.cache.prune is not None and recipe.cache.read is not None
    assert (recipe.cache.prune["method"], recipe.cache.read["method"]) == ("snapkv", "quest")
    assert recipe.cache.read["linear"] == 0.5
