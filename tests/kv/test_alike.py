"""Tokens that are put in order of like keys: which slots they get, and that nothing else changes by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

import einfold
from einfold.compiler.ir.kv.keep.full import Full
from einfold.compiler.ir.kv.layout import BOUNDS, Buffer, CacheLayout
from einfold.compiler.ir.kv.read.pages.choosing import statistics_of
from einfold.compiler.ir.kv.read.quest.reader import Quest
from einfold.compiler.ir.kv.spill import spillable
from einfold.compiler.ir.kv.store.plain.storage import Plain
from einfold.compiler.ir.manifest import Manifest
from einfold.compiler.ir.types import DTYPES
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.kv_read.by_reader import ReadByReader
from einfold.errors import ArtifactError, IRError, UnsupportedError
from einfold.runtime.alike import like_order
from einfold.runtime.artifact import Artifact
from einfold.runtime.buffers import empty
from einfold.runtime.cache import Cache
from einfold.runtime.engine import Engine
from einfold.runtime.key_scales import key_scales

from .. import models
from ..programs import program
from . import common
from .test_quest import BODY

READER = Quest(page=4, share=0.25, tokens=12, alike=16)
TOKENS = [3 + (7 * place + place * place) % 90 for place in range(100)]
WHOLE = {"method": "quest", "page": 4, "share": 1.0, "tokens": 12, "skip_layers": 0}
FEW = WHOLE | {"share": 0.25}
Engines = dict[str, Engine]
NAMES = ("cache.0.0", "cache.1.0")
SCALES = np.linspace(0.5, 1, common.HEADS * common.KEY, dtype=np.float32).reshape(2, -1)


def test_pages_hold_what_is_alike() -> None:
    """Eight keys at each corner of a box, in a random order."""
    random = np.random.default_rng(0)
    corners = np.array([[x, y, z, 0] for x in (0, 40) for y in (0, 20) for z in (0, 10)])
    kind_BN = np.stack([random.permutation(np.arange(64) % 8) for _ in range(3)])
    noise = random.standard_normal((3, 64, 4))
    order_BN = like_order(corners[kind_BN] + noise, 8)
    assert np.array_equal(np.sort(order_BN, 1), np.broadcast_to(np.arange(64), (3, 64)))
    found = np.take_along_axis(kind_BN, order_BN, 1).reshape(3, 8, 8)
    assert (found == found[:, :, :1]).all()


def test_keys_that_are_all_the_same_stay_where_they_are() -> None:
    assert like_order(np.ones((2, 32, 8)), 4).tolist() == [list(range(32))] * 2


@pytest.mark.parametrize("used", range(0, 90, 7))
def test_chunks_are_whole_and_leave_the_first_page_and_the_newest(used: int) -> None:
    chunks = READER.chunks(used)
    assert list(chunks) == [4 + 16 * n for n in range(len(chunks))]
    newest = (used - 1) // 4 - 1  # of the two newest pages the older
    ordered = 4 + 16 * len(chunks)
    assert not chunks or ordered // 4 <= newest
    assert used - ordered < 16 + 3 * 4
    assert not Quest(page=4).chunks(used)


class Tensors:
    """Makes buffers of torch."""

    def __call__(self, spec: Buffer) -> torch.Tensor:
        return torch.zeros([int(size) for size in spec.shape], dtype=DTYPES[spec.dtype])


def rows_of(*arrays: npt.NDArray[Any]) -> list[list[float]]:
    """The tokens' numbers, sorted."""
    return sorted(np.concatenate(arrays, -1).tolist())


@pytest.mark.parametrize("make", [empty, Tensors()], ids=["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "i8"])
def test_tokens_move_within_their_chunk_with_their_values_and_bounds(make: Any, dtype: str) -> None:
    """Rows of two lengths, in steps of many sizes: beside them caches in which nothing moves."""
    storage = Plain(dtype, "channel" if dtype == "i8" else "none")
    layouts = [common.layout_of(Full(), storage, reader) for reader in (READER, Quest(page=4))]
    caches = [
        Cache.allocate(layout, 2, 80, make=make, key_scales=dict.fromkeys(NAMES, SCALES))
        for layout in layouts
    ]
    random, moved = np.random.default_rng(0), 0
    for sizes in ([1, 1], [30, 12], [5, 1], [0, 17], [1, 1], [33, 9], [8, 2]):
        new = random.integers(-90, 90, (2, 2, 2, max(sizes), common.KEY), np.int8)
        for cache in caches:
            for name, buffer in cache.buffers.items():
                _, number, _, part = name.split(".")
                of = new[int(number), :, :, :, : buffer.shape[3]] + (part == "value")
                for row, (first, size) in enumerate(zip(cache.lengths, sizes, strict=True)):
                    if part != BOUNDS and size:
                        slots = torch.as_tensor(buffer[row])
                        slots[:, first : first + size] = torch.as_tensor(of[row, :, :size])
            for layer in (0, 1):
                bounds, keys = (
                    torch.as_tensor(cache.buffers[f"cache.{layer}.0.{p}"]) for p in (BOUNDS, "key")
                )
                used = torch.as_tensor(cache.lengths)
                READER.choosing.refresh(READER, bounds, keys, used, max(max(sizes), 1))
            cache.advance(np.array(sizes))
        for row, used in enumerate(caches[0].lengths.tolist()):
            moved += check_row(caches, row, used)
    assert moved > 8


def check_row(caches: list[Cache], row: int, used: int) -> int:
    """One row, beside the cache in which nothing moves; gives the chunks that have moved."""
    moved, chunks = 0, READER.chunks(used)
    ordered = 4 + 16 * len(chunks)
    for layer in (0, 1):
        keys, values, bounds = (
            [np.asarray(cache.buffers[f"cache.{layer}.0.{part}"][row]) for cache in caches]
            for part in ("key", "value", BOUNDS)
        )
        for slots in (keys, values):
            assert np.array_equal(slots[0][:, :4], slots[1][:, :4])
            assert np.array_equal(slots[0][:, ordered:used], slots[1][:, ordered:used])
        for head in range(common.HEADS):
            for first in chunks:
                own = slice(first, first + 16)
                mine, other = (rows_of(keys[n][head, own], values[n][head, own]) for n in (0, 1))
                assert mine == other
                moved += not np.array_equal(keys[0][head, own], keys[1][head, own])
        whole = torch.as_tensor(keys[0][None, :, : used // 4 * 4])
        wanted = statistics_of(READER, whole)[0].numpy()
        assert np.array_equal(bounds[0][:, : used // 4], wanted)
    return moved


def test_codes_are_alike_by_what_they_stand_for() -> None:
    """One channel counts, and the others are codes of nothing."""
    layout = common.layout_of(Full(), Plain("i8", "channel"), READER)
    scale_KD = np.zeros((common.HEADS, common.KEY), np.float32)
    scale_KD[:, 3] = 1
    cache = Cache.allocate(layout, 1, 40, key_scales=dict.fromkeys(NAMES, scale_KD))
    keys = cache.buffers["cache.1.0.key"]
    keys[:] = np.random.default_rng(0).integers(-90, 90, keys.shape, np.int8)
    before = np.sort(keys[0, :, 4:20, 3])
    cache.advance(36)
    found = np.sort(keys[0, :, 4:20, 3].reshape(common.HEADS, 4, 4))
    found = np.take_along_axis(found, found[..., :1].argsort(1), 1)
    assert np.array_equal(found.reshape(common.HEADS, 16), before)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """One model with all tokens read and with few, each with its pages in order or not."""
    folder = tmp_path_factory.mktemp("alike")
    model = models.save("llama", folder / "model")
    found = {}
    for name, read in {
        "plain": None,
        "whole": WHOLE | {"alike": 16},
        "few": FEW,
        "alike": FEW | {"alike": 16},
        "plain int8": None,
        "whole int8": WHOLE | {"alike": 16},
        "alike int8": FEW | {"alike": 16},
    }.items():
        storage = "int8" if name.endswith("int8") else "f32"
        recipe = {"target": "onnx", "cache": {"storage": storage, "read": read}}
        einfold.compile(model, folder / name, recipe=recipe, check=False)
        for target in ("onnx", "reference"):
            found[f"{name} {target}"] = einfold.load(folder / name, engine=target, threads=1).engine
    return found


def logits(engine: Engine, prompts: list[list[int]], more: int) -> npt.NDArray[np.float32]:
    """Behind prompts of their lengths, and behind each of `more` tokens that follow one by one."""
    cache = engine.allocate(len(prompts), 100, max(map(len, prompts)))
    found = [engine.prefill(cache, [np.array(row) for row in prompts])]
    for step in range(more):
        cache.make_room(1)
        ids = np.array([[TOKENS[-step - 1]]] * len(prompts))
        rows = np.arange(len(prompts))
        found.append(engine.step(cache, ids, cache.lengths[:, None], rows).copy())
        cache.advance(1)
    return np.stack(found)


@pytest.mark.parametrize(
    ("kind", "within"),
    [("onnx", 1e-4), ("reference", 1e-4), ("int8 reference", 1e-4), ("int8 onnx", 2e-3)],
)
def test_who_reads_everything_sees_no_difference(
    engines: Engines, kind: str, within: float
) -> None:
    """One row, and rows of many lengths; tokens go on being put in order behind the prompts. Products of
    integers are in other planes where pages are read."""
    for prompts in ([TOKENS[:40]], [TOKENS[:50], TOKENS[5:9], TOKENS[:23]]):
        want, got = (logits(engines[f"{n} {kind}"], prompts, 45) for n in ("plain", "whole"))
        np.testing.assert_allclose(got, want, atol=within * np.abs(want).max())


@pytest.mark.parametrize("target", ["onnx", "reference"])
def test_a_second_prompt_behind_a_first_sees_no_difference(engines: Engines, target: str) -> None:
    found = []
    for name in ("plain", "whole"):
        engine = engines[f"{name} {target}"]
        cache = engine.allocate(1, 100)
        row = np.array(TOKENS)
        for end in (45, 90):
            *_, (_, last) = engine.stream(cache, row[:end], False, start=int(cache.lengths[0]))
            found.append(last[-1])
    first, second, *others = found
    np.testing.assert_allclose(others, [first, second], atol=1e-4 * np.abs(second).max())


def test_onnx_reads_what_the_reference_chooses(engines: Engines) -> None:
    """Token by token, for a step of several reads everything in onnxruntime alone."""
    found = []
    for name in ("alike reference", "alike onnx", "few onnx"):
        engine = engines[name]
        steps = engine.stream(engine.allocate(1, 100), np.array(TOKENS), all_logits=True)
        found.append(np.concatenate([part for _, part in steps]))
    want, got, other = found
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert np.abs(got - other).max() > 1e-3  # other pages are read than without


def test_an_artifact_brings_the_scales_of_its_keys(engines: Engines, tmp_path: Path) -> None:
    found = engines["alike int8 onnx"].key_scales
    assert found is not None
    assert set(found) == set(NAMES)
    assert engines["alike onnx"].key_scales == engines["plain int8 onnx"].key_scales == {}
    model = models.save("llama", tmp_path / "model")
    read = WHOLE | {"page": 2, "alike": 4}
    recipe = {"target": "onnx", "cache": {"storage": "int8", "read": read}}
    einfold.compile(model, tmp_path / "a", recipe=recipe)  # 16 tokens are checked
    path = tmp_path / "a" / "weights.safetensors"
    weights = load_file(path)
    for changed, said in (
        (None, "has no scales of keys by which the cache could be read"),
        (torch.ones(2, 16, dtype=torch.bfloat16), "key_scale as bfloat16|scales of keys"),
        (np.ones((2, 3), np.float32), r"holds cache\.1\.0\.key_scale as float32 \(2, 3\)"),
    ):
        other = {n: torch.from_numpy(x) for n, x in weights.items() if n != "cache.1.0.key_scale"}
        if changed is not None:
            other["cache.1.0.key_scale"] = torch.as_tensor(changed)
        save_file(other, path)
        with pytest.raises(ArtifactError, match=said):
            key_scales(Artifact(tmp_path / "a", Manifest.read(tmp_path / "a")))


def test_bytes_are_those_without() -> None:
    layouts = [common.layout_of(Full(), reader=each) for each in (READER, Quest(4, 0.25, 12))]
    common.check_account(layouts[0])
    common.check_text(layouts[0])
    assert layouts[0].bytes(3, 90) == layouts[1].bytes(3, 90)
    assert layouts[0].read_bytes(3, 90) == layouts[1].read_bytes(3, 90)


def test_slots_that_get_another_order_are_not_spilled() -> None:
    """What lies in the file is written once."""
    kept, spilled = (common.layout_of(Full(), reader=each) for each in (READER, Quest(4, 0.25, 12)))
    assert not spillable(kept)
    assert spillable(spilled) == list(spilled.layers)


@pytest.mark.parametrize("alike", [-16, 4, 12, 24, 8192])
def test_chunks_that_do_not_halve_into_pages_are_refused(alike: int) -> None:
    with pytest.raises(
        IRError,
        match=f"alike is 0, or a power of two of tokens from two pages of 4 to 4096, not {alike}",
    ):
        Quest(page=4, alike=alike)


def test_slots_that_another_layer_reads_within_a_window_keep_their_order() -> None:
    for alike, said in (
        (16, "heads 0,1 are read within a window by layer 1 too, so that slots keep their order"),
        (0, "heads 0,1 read 0.25 of the tokens"),
    ):
        found = program(BODY.replace("WINDOW", "0").replace("none, 1, 0.25, 0", "none, 1, 0.25, 9"))
        PlanCache().run(found)
        assert found.layout is not None
        first, second = found.layout.layers
        groups = tuple(replace(group, owner=0) for group in second.groups)
        found.layout = CacheLayout((first, replace(second, groups=groups)))
        result = ReadByReader(Quest(4, 0.25, 12, alike=alike, skip_layers=0)).run(found)
        assert result.notes[0].what.startswith(said)


@pytest.mark.parametrize("storage", ["f32", "int8"])
def test_a_cache_for_transformers_that_reads_everything_writes_the_same(storage: str) -> None:
    model = models.build("llama")
    ids = torch.tensor([TOKENS[:40]])
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    recipe: dict[str, Any] = {"cache": {"storage": storage}}
    with einfold.cache_for(model, recipe, context=128, check=False) as cache:
        plain = model.generate(ids, past_key_values=cache, **options)
    recipe["cache"]["read"] = WHOLE | {"alike": 16}
    with einfold.cache_for(model, recipe, context=128, check=False) as cache:
        found = model.generate(ids, past_key_values=cache, **options)
        assert found.tolist() == plain.tolist()
        with pytest.raises(
            UnsupportedError, match="crop cannot tell the newest tokens once quest has put"
        ):
            cache.crop(-20)
        cache.crop(-5)  # behind all that was put in order
        left = found[:, :75]
        assert (
            model.generate(
                left, past_key_values=cache, **(options | {"max_new_tokens": 5})
            ).tolist()
            == plain.tolist()
        )
        hiding = torch.ones(1, 1, 1, 80, dtype=torch.bool)
        hiding[..., 50] = False
        with pytest.raises(UnsupportedError, match="but quest puts tokens into other slots"):
            model(ids[:, :1], attention_mask=hiding, past_key_values=cache)
