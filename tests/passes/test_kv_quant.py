from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import einfold
from einfold.compiler.calibrate.observers.kv_ranges import key_range
from einfold.compiler.calibrate.observers.kv_steps import anywhere, steps
from einfold.compiler.calibrate.text import calibration_tokens
from einfold.compiler.ir.kv.layout import CacheLayout, HeadGroup
from einfold.compiler.ir.kv.read.quest.reader import Quest
from einfold.compiler.ir.kv.store.plain.storage import Plain
from einfold.compiler.ir.ops.rotary import rotary_reference
from einfold.compiler.ir.quant.hadamard import hadamard
from einfold.compiler.ir.verifier import verify
from einfold.compiler.ir.weights import Weight
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.kv_quant.static_int4 import StaticInt4
from einfold.compiler.passes.kv_quant.static_int8 import StaticInt8
from einfold.errors import CalibrationError, EinfoldError, IRError, RecipeError

from .. import models
from ..greedy import all_logits
from ..programs import calls, program, run
from ..quick import quick, rarely

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


def test_the_layout_says_int4_and_keys_are_rotated_and_centred() -> None:
    found = program(BODY)
    PlanCache().run(found)
    assert found.layout is not None
    before = found.layout.bytes(1, 10)
    result = StaticInt4().run(found)
    assert found.layout == CacheLayout.parse(list(found.layout.lines()))
    AttachCache().run(found)
    verify(found, deep=True)
    assert list(found.layout.lines()) == [
        "cache 0.0 heads=0,1 of=2 key=8 value=8 policy=full storage=i4/channel"
    ]
    assert found.layout.bytes(1, 10) * 8 == before
    assert result.notes[0].what == "16 bytes a token, from 128"
    text = "\n".join(calls(found))
    assert "%cache.0.0.key_scale, %cache.0.0.value_scale, 0, 0.25" in text
    assert text.count("hadamard.8") == 2 and "%cache.0.0.key_centre" in text


def test_steps_have_the_least_error_and_centres_are_means_of_rotated_keys() -> None:
    angles = torch.outer(torch.arange(64.0), torch.tensor([1.0, 0.3, 0.1, 0.01]))
    table = torch.randn(11, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = angles.cos(), angles.sin()
    found = program(BODY, e=table, cos=cos, sin=sin)
    PlanCache().run(found)
    StaticInt4().run(found)
    AttachCache().run(found)
    tokens = torch.arange(11)[None]
    found.calibrations[0].run(tokens)
    used_TKD = table.reshape(-1, 2, 8)
    turned_TKD = hadamard(anywhere(used_TKD, cos, sin, False))
    centre_KD = found.weights["cache.0.0.key_centre"].load()
    torch.testing.assert_close(centre_KD, turned_TKD.mean(0))
    for name, x_TKD in (("key", turned_TKD - centre_KD), ("value", used_TKD)):
        step_KD = found.weights[f"cache.0.0.{name}_scale"].load()
        torch.testing.assert_close(step_KD, steps(x_TKD, 4))

        def error(step_KD: torch.Tensor, x_TKD: torch.Tensor = x_TKD) -> torch.Tensor:
            return ((x_TKD / step_KD).round().clamp(-8, 7) * step_KD - x_TKD).square().mean(0)

        assert bool((error(step_KD) <= error(x_TKD.abs().amax(0) / 7) + 1e-7).all())


def test_keys_that_are_seen_anywhere_are_as_long_as_they_are() -> None:
    angles = torch.outer(torch.arange(500.0), torch.tensor([1.0, 0.3, 0.01]))
    keys = torch.randn(20, 2, 10, generator=torch.Generator().manual_seed(0))
    found = anywhere(keys, angles.cos(), angles.sin(), True)
    torch.testing.assert_close(found.norm(dim=-1), keys.norm(dim=-1).repeat(4, 1))
    assert not torch.allclose(found[:20], found[20:40], atol=0.1)
    assert anywhere(keys, None, None, False) is keys


def test_what_is_subtracted_from_keys_changes_nothing() -> None:
    """Of slots in float32, with a centre far larger than the keys."""
    outs = []
    for centre in (None, torch.randn(2, 8) * 10):
        found = program(BODY)
        PlanCache().run(found)
        if centre is not None:
            found.cache_weights["cache.0.0.key_centre"] = Weight.of(centre)
        AttachCache().run(found)
        verify(found, deep=True)
        given = {"input_ids": torch.tensor([[3, 5, 9, 1]]), "position_ids": torch.arange(4)[None]}
        slots = {f"cache.0.0.{part}": torch.zeros(1, 2, 9, 8) for part in ("key", "value")}
        outs.append(run(found, **given, lengths=torch.zeros(1, dtype=torch.long), **slots))
    torch.testing.assert_close(outs[0]["o"], outs[1]["o"], rtol=1e-4, atol=1e-5)
    assert (outs[0]["cache.0.0.key"] - outs[1]["cache.0.0.key"]).abs().max() > 5


@pytest.mark.parametrize(("old", "new"), [("0.0)", "2.0)"), ("%x, none, 0", "%x, %s, 0")])
def test_nothing_is_subtracted_where_a_softmax_sees_it(old: str, new: str) -> None:
    """Capped logits, and learned sinks."""
    body = BODY.replace(old, new).replace(
        'input %ids "input', 'weight @s : f32[2]\ninput %ids "input'
    )
    body = body.replace("call %h", 'read %s "s" : f32[2]\ncall %h')
    found = program(body)
    PlanCache().run(found)
    StaticInt4().run(found)
    assert sorted(found.cache_weights) == ["cache.0.0.key_scale", "cache.0.0.value_scale"]


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


WINDOWS = {"prune": {"method": "streaming_llm", "sinks": 2, "recent": 9, "slack": 5}}
HEADS = {"prune": {"method": "razor_attention", "sinks": 2, "recent": 9, "slack": 5}}


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("llama", {}),
        rarely("qwen3", {}),
        ("gemma2", {}),
        rarely("gpt_oss", {}),
        rarely("gpt2", {}),
        rarely("gpt_neox", {}),
        rarely("llama", WINDOWS),
        ("llama", HEADS),
        rarely("llama", {"prune": {"method": "h2o", "tokens": 13, "recent": 6, "slack": 4}}),
        rarely("llama", {"prune": {"method": "kvzip", "tokens": 32, "share": 0.5, "slack": 8}}),
    ],
)
def test_onnxruntime_reads_int4_as_the_reference_does(
    name: str,
    cache: dict[str, Any],
    model_folder: Callable[[str], Path],
    artifact: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Logits over chunk borders and moves, rows of unequal length, and the bytes of the account."""
    recipe = {"cache": {"storage": "int4", **cache}}
    einfold.compile(model_folder(name), tmp_path / "out", recipe=recipe)
    fast = einfold.load(tmp_path / "out", chunk=16, threads=1)
    slow = einfold.load(tmp_path / "out", chunk=16, engine="reference")
    tokens = np.random.default_rng(0).integers(3, models.VOCABULARY, 70).tolist()
    want, got = all_logits(slow, tokens), all_logits(fast, tokens)
    np.testing.assert_allclose(got, want, atol=2e-3)
    layout = fast.artifact.manifest.layout()
    assert fast.engine.allocate(2, 50).nbytes == layout.bytes(2, 50)
    prompts = [tokens[:40], tokens[:9]]
    rows = [
        [row.tokens for row in each.generate_batch(prompts, max_new_tokens=8, ignore_eos=True)]
        for each in (fast, slow)
    ]
    assert rows[0] == rows[1]
    if not cache:
        exact = einfold.load(artifact(name), threads=1)
        assert 8 * layout.bytes(3, 50) == exact.artifact.manifest.layout().bytes(3, 50)  # type: ignore[operator]
        plain = all_logits(exact, tokens)
        error = np.sqrt(np.square(got - plain).mean() / np.square(plain - plain.mean()).mean())
        assert 1e-3 < error < 0.4


def test_what_cannot_hold_int4_is_refused(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = model_folder("llama")
    for options, says in (
        ({"portable": True}, "operator that reads an int4 cache"),
        ({"read": "quest"}, "hold two numbers in a byte; take int8"),
        ({"quant": "kivi"}, "both say"),
        ({"prune": "ems:tokens=8,recent=4,slack=3"}, "averaged, which i4/channel would"),
    ):
        with pytest.raises(RecipeError, match=says):
            einfold.compile(folder, tmp_path / "a", cache="int4", **options)
    odd = models.save("llama", tmp_path / "odd", head_dim=12)
    with pytest.raises(EinfoldError, match="multiple of 8"):
        einfold.compile(odd, tmp_path / "b", cache="int4")
    with pytest.raises(IRError, match="a head of 7 numbers has one over"):
        Plain("i4", "channel").slot_width(7)
    with pytest.raises(IRError, match="write i4/channel"):
        Plain("i4")
    with pytest.raises(IRError, match="has two in a byte"):
        HeadGroup((0,), storage=Plain("i4", "channel"), reader=Quest())
