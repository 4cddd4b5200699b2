from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import einfold
from einfold.compiler.calibrate.observers.kv_ranges import key_range
from einfold.compiler.calibrate.text import calibration_tokens
from einfold.compiler.ir.ops.rotary import rotary_reference
from einfold.compiler.ir.verifier import verify
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.kv_quant.static_int8 import StaticInt8
from einfold.errors import CalibrationError, EinfoldError, RecipeError

from .. import models
from ..greedy import all_logits
from ..programs import calls, program
from ..quick import quick

BODY = """
    weight @e : f32[11, 16]
    weight @cos : f32[64, 4]
    weight @sin : f32[64, 4]
    input %ids "input_ids" : i64[B, S]
    input %pos "position_ids" : i64[B, S]
    read %e "e" : f32[11, 16]
    read %cos "cos" : f32[64, 4]
    read %sin "sin" : f32[64, 4]
    call %h = einfold.embedding(%ids, %e) : f32[B, S, 16]
    call %x = aten.unflatten.int(%h, -1, [2, 8]) : f32[B, S, 2, 8]
    call %rx = einfold.rotary(%x, %pos, %cos, %sin, false) : f32[B, S, 2, 8]
    call %o = einfold.attention(%rx, %rx, %x, none, 0, 0.25, 0, 0.0) : f32[B, S, 2, 8]
    output "o" = %o
"""


def test_the_layout_says_int8_and_attention_reads_the_scales() -> None:
    found = program(BODY)
    PlanCache().run(found)
    assert found.layout is not None
    before = found.layout.bytes(1, 10)
    result = StaticInt8().run(found)
    AttachCache().run(found)
    verify(found, deep=True)
    assert list(found.layout.lines()) == [
        "cache 0.0 heads=0,1 of=2 key=8 value=8 policy=full storage=i8/channel"
    ]
    assert found.layout.bytes(1, 10) * 4 == before
    assert "%cache.0.0.key_scale, %cache.0.0.value_scale, 0, 0.25" in calls(found)[2]
    assert result.notes[0].what == "32 bytes a token, from 128"


def test_scales_are_the_ranges_of_the_text() -> None:
    angles = torch.outer(torch.arange(64.0), torch.tensor([1.0, 0.3, 0.1, 0.01]))
    table = torch.randn(11, 16)
    found = program(BODY, e=table, cos=angles.cos(), sin=angles.sin())
    PlanCache().run(found)
    StaticInt8().run(found)
    AttachCache().run(found)
    tokens = torch.tensor([[3, 5, 5, 9], [1, 3, 2, 0]])
    (calibration,) = found.calibrations
    calibration.run(tokens)
    used = table[tokens.unique()].reshape(-1, 2, 8)
    value_scale = found.weights["cache.0.0.value_scale"].load()
    torch.testing.assert_close(value_scale, used.abs().amax(0) / 127)
    key_scale = found.weights["cache.0.0.key_scale"].load()
    pairs = used.reshape(-1, 2, 2, 4).norm(dim=2).amax(0) / 127
    torch.testing.assert_close(key_scale, torch.cat((pairs, pairs), -1))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("stretch", [1.0, 1.4])
def test_the_range_of_keys_holds_at_every_position(interleaved: bool, stretch: float) -> None:
    angles = torch.outer(torch.arange(500.0), torch.tensor([1.0, 0.3, 0.01]))
    cos, sin = angles.cos() * stretch, angles.sin() * stretch
    keys = torch.randn(1, 20, 2, 10, generator=torch.Generator().manual_seed(0))
    bound = key_range(keys, cos, sin, interleaved)
    largest = torch.zeros(2, 10)
    for start in range(0, 500, 20):
        positions = torch.arange(start, start + 20)[None]
        for shift in range(20):
            turned = rotary_reference(keys, positions.roll(shift, 1), cos, sin, interleaved)
            largest = torch.maximum(largest, turned.abs().amax(dim=(0, 1)))
    assert bool((largest <= bound * 1.00001).all())
    assert bool((largest >= bound * 0.95).all())  # and is not much larger than it must be


def test_values_that_are_not_finite_are_refused() -> None:
    table = torch.randn(11, 16)
    table[3, 12] = float("inf")
    found = program(BODY, e=table)
    PlanCache().run(found)
    StaticInt8().run(found)
    with pytest.raises(CalibrationError, match=r"of layer 0 are not finite"):
        found.calibrations[0].run(torch.tensor([[3, 4]]))


def test_texts(text_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(text_model)
    size = len(tokenizer)
    ids, origin = calibration_tokens(tokenizer, None, 1024, size, 4096)
    assert ids.shape == (4, 256) and origin == "the built-in text"
    ids, origin = calibration_tokens(None, None, 600, 50, 128)
    assert ids.shape == (4, 128) and "random" in origin and int(ids.max()) < 50
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    with pytest.raises(CalibrationError, match="256 are needed"):
        calibration_tokens(tokenizer, short, 1024, size, 4096)
    with pytest.raises(CalibrationError, match="cannot read"):
        calibration_tokens(tokenizer, tmp_path / "absent", 1024, size, 4096)
    with pytest.raises(CalibrationError, match="the model has 7 tokens"):
        calibration_tokens(tokenizer, None, 1024, 7, 4096)


@pytest.mark.parametrize(
    "name", quick(["llama", "gemma2", "gpt2", "gpt_neox", "mistral"], "llama", "gemma2")
)
def test_an_int8_cache_changes_little(
    name: str, model_folder: Callable[[str], Path], artifact: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    einfold.compile(model_folder(name), out, cache="int8")
    small, exact = einfold.load(out, chunk=16, threads=1), einfold.load(artifact(name), threads=1)
    tokens = np.random.default_rng(0).integers(3, models.VOCABULARY, 70).tolist()
    want = all_logits(exact, tokens)
    got = all_logits(small, tokens)
    error = np.sqrt(np.square(got - want).mean() / np.square(want - want.mean()).mean())
    assert 1e-4 < error < 0.02
    layout = small.artifact.manifest.layout()
    assert 4 * layout.bytes(3, 50) == exact.artifact.manifest.layout().bytes(3, 50)  # type: ignore[operator]
    # Rows of a batch, prefilled one by one in chunks, read the same cache.
    alone = small.generate(tokens[:40], max_new_tokens=8, ignore_eos=True).tokens
    rows = small.generate_batch([tokens[:40], tokens[:9]], max_new_tokens=8, ignore_eos=True)
    assert rows[0].tokens == alone


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_slots_of_float16(
    name: str, model_folder: Callable[[str], Path], artifact: Callable[..., Path], tmp_path: Path
) -> None:
    einfold.compile(model_folder(name), tmp_path / "a", cache="f16", target="reference")
    small, exact = einfold.load(tmp_path / "a", chunk=16), einfold.load(artifact(name), threads=1)
    tokens = np.random.default_rng(0).integers(3, models.VOCABULARY, 70).tolist()
    want, got = all_logits(exact, tokens), all_logits(small, tokens)
    error = np.sqrt(np.square(got - want).mean() / np.square(want - want.mean()).mean())
    assert 1e-6 < error < 1e-3
    layout = small.artifact.manifest.layout()
    assert 2 * layout.bytes(3, 50) == exact.artifact.manifest.layout().bytes(3, 50)  # type: ignore[operator]
    assert small.engine.allocate(2, 50).nbytes == layout.bytes(2, 50)


def test_slots_of_float16_where_nothing_reads_them(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="takes about the memory that they save"):
        einfold.compile(model_folder("llama"), tmp_path / "a", cache="f16")


def test_what_cannot_hold_int8_is_refused(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="portable flavour has no operator"):
        einfold.compile(model_folder("llama"), tmp_path / "a", cache="int8", portable=True)
    folder = models.save("llama", tmp_path / "odd", head_dim=12)
    with pytest.raises(EinfoldError, match="multiple of 8"):
        einfold.compile(folder, tmp_path / "b", cache="int8")
    assert not (tmp_path / "b").exists()
