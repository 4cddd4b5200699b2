from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import einfold
from einfold.compiler.calibrate.observers.kv_bases import best_basis, relative_error
from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.kv.layout import CacheLayout
from einfold.compiler.ir.ops import low_rank
from einfold.compiler.ir.ops.record import in_place
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.verifier import verify
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.kv_quant.static_int8 import StaticInt8
from einfold.compiler.passes.kv_share.cskv import CSKV, features_of
from einfold.compiler.recipe import Recipe
from einfold.errors import CalibrationError, IRError, RecipeError
from einfold.runtime.cache import Cache

from .. import models
from ..methods import chosen
from ..programs import calls, program, run
from .test_cross_layer import planned, text


def test_every_token_is_stored_as_features() -> None:
    found = planned(0, 4)
    result = CSKV(keep=0.25, value_keep=0.5, sinks=1, recent=8, slack=4).run(found)
    window = "policy=window(sinks=1,recent=8,slack=4,compensation=0,prefill=exact)"
    assert list(found.layout.lines()) == [
        f"cache 0.0 heads=0 of=1 key=8 value=8 {window} storage=low_rank(key_rank=2,value_rank=4,dtype=f32)",
        "cache 1.0 heads=0 of=1 key=8 value=8 policy=full storage=f32",
    ]
    assert CacheLayout.parse(list(found.layout.lines())) == found.layout
    assert result.notes[0].what.startswith("24 bytes a token, from 64; 9 tokens")
    assert result.notes[1].what == "has a sliding window of 4 tokens of its own"
    # Slots of the window, features of every token; and the other layer whole.
    assert found.layout.layers[0].groups[0].slots(40) == 13
    per_row = 13 * 16 * 4 + 40 * 6 * 4 + 40 * 16 * 4
    assert found.layout.bytes(2, 40) == 2 * per_row == Cache.allocate(found.layout, 2, 40).nbytes
    AttachCache().run(found)
    verify(found, deep=True)
    (call,) = [c for c in calls(found) if "low_rank_attention" in c]
    assert "%cache.0.0.key_low, %cache.0.0.value_low, %cache.0.0.key_basis" in call
    assert "%slots.0, %lengths, none" in call and call.endswith("0, 0.3, 0.0, false, 1)")
    assert "cache.0.0.value_low" in found.output_names()
    assert not found.cache_weights


def attached(keep: float, *windows: int, **options: object) -> Program:
    found = planned(*windows)
    CSKV(keep=keep, recent=3, slack=2, **options).run(found)  # type: ignore[arg-type]
    found.calibrations[0].run(torch.randint(11, (4, 32)))
    AttachCache().run(found)
    verify(found, deep=True)
    return found


def decoded(found: Program, ids: torch.Tensor, prompts: list[int], steps: int) -> torch.Tensor:
    """Logits of `steps` tokens behind prompts of unequal length, [B, steps, M]."""
    longest, rows = max(prompts), len(prompts)
    cache = Cache.allocate(found.layout, rows, longest + steps, longest)  # type: ignore[arg-type]
    interpreter = Interpreter(found, instead=in_place())

    def step(tokens: torch.Tensor, positions: torch.Tensor, sizes: np.ndarray) -> torch.Tensor:
        cache.make_room(tokens.shape[1])
        arrays = {n: torch.from_numpy(a) for n, a in (cache.counters | cache.buffers).items()}
        out = interpreter.run({"input_ids": tokens, "position_ids": positions, **arrays})
        cache.advance(sizes)
        return out["logits"]

    limit = cache.step_limit()
    for place in range(0, longest, limit):
        size = min(limit, longest - place)
        counts = np.clip(np.array(prompts) - place, 0, size)
        assert size == longest or len(set(prompts)) == 1
        positions = torch.arange(place, place + size).expand(rows, -1)
        step(ids[:, place : place + size], positions, counts)
    cache.settle()
    lengths = torch.tensor(prompts)
    got = []
    for offset in range(steps):
        at = (lengths + offset)[:, None]
        got.append(step(ids.gather(1, at), at, np.ones(rows, np.int64)))
    return torch.cat(got, 1)


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("tile", [1024, 4])
def test_all_features_give_full_attention(
    prefill: str, sinks: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "TILE", tile)
    found = attached(0.99, 0, 0, prefill=prefill, sinks=sinks)
    assert found.weights["cache.0.0.key_basis"].shape == (8, 8)
    ids = torch.randint(11, (2, 30), generator=torch.Generator().manual_seed(1))
    prompts = [9, 14] if prefill == "exact" else [14, 14]
    want = run(planned(0, 0), input_ids=ids, position_ids=torch.arange(30).expand(2, -1))["logits"]
    got = decoded(found, ids, prompts, 12)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(got[row], want[row, prompt : prompt + 12], rtol=1e-3, atol=1e-3)


def test_fewer_features_are_further_off() -> None:
    ids = torch.randint(11, (1, 30), generator=torch.Generator().manual_seed(1))
    want = run(planned(0), input_ids=ids, position_ids=torch.arange(30)[None])["logits"][:, 18:]
    errors = [
        float((decoded(attached(keep, 0), ids, [18], 12) - want).norm() / want.norm())
        for keep in (0.25, 0.5, 0.75, 0.99)
    ]
    assert errors[0] > errors[1] > errors[2] > 10 * errors[3]


@pytest.mark.parametrize("tokens", [5, 40])
def test_the_basis_is_the_best_of_its_rank(tokens: int) -> None:
    x = torch.randn(2, tokens, 2, 8) * torch.logspace(0, -2, 16).reshape(2, 8)
    basis = best_basis(x, 4, "keys")
    torch.testing.assert_close(basis @ basis.T, torch.eye(4), atol=1e-5, rtol=0)
    singular = torch.linalg.svdvals(x.flatten(2).flatten(0, 1))
    best = singular[4:].norm() / singular.norm()
    torch.testing.assert_close(relative_error(x, basis), best, rtol=1e-3, atol=1e-6)


def test_texts_and_weights_that_give_no_basis() -> None:
    with pytest.raises(
        CalibrationError, match="has 3 tokens, too few to find 4 features of keys of"
    ):
        best_basis(torch.randn(1, 3, 2, 8), 4, "keys of layer 0")
    table = torch.randn(11, 16)
    table[3] = float("nan")
    found = program(text(0), e=table)
    PlanCache().run(found)
    CSKV(recent=16, slack=16).run(found)
    with pytest.raises(CalibrationError, match="keys of layer 0 are not finite"):
        found.calibrations[0].run(torch.full((1, 64), 3))


def test_features_that_float16_has_no_room_for_are_cut() -> None:
    low, token = torch.zeros(1, 2, 1, dtype=torch.float16), torch.tensor([[1]])
    low_rank.write_features(low, torch.full((1, 1, 1, 2), -1e6), torch.ones(1, 2), token)
    assert low.flatten().tolist() == [0, torch.finfo(torch.float16).min]


def test_errors_are_reported() -> None:
    found = planned(0)
    result = CSKV(keep=0.5, recent=16, slack=16).run(found)
    found.calibrations[0].run(torch.randint(11, (4, 32)))
    for weight in found.cache_weights.values():
        weight.load()
    assert sorted(result.measured) == ["layer 0 keys", "layer 0 values"]
    assert all(0 < error < 1 for error in result.measured.values())


def test_many_features_are_a_multiple_of_sixteen() -> None:
    assert [features_of(share, 128) for share in (0.001, 0.2, 0.5, 0.6, 0.8)] == [1, 26, 64, 80, 96]
    assert features_of(0.2, 1024) == 208 and features_of(0.99, 76) == 76


def test_what_makes_no_sense_is_refused() -> None:
    for options, reason in (
        ({"keep": 1.0}, "share of the channels between 0 and 1"),
        ({"value_keep": 0.0}, "share of the channels between 0 and 1"),
        ({"recent": 0}, "1 or more recent tokens"),
        ({"dtype": "i8"}, "features are stored as f32 or f16"),
    ):
        with pytest.raises(RecipeError, match=reason):
            CSKV(**options)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="nothing would be read from its features"):
        CSKV(recent=32, slack=32).run(planned(0))
    line = (
        "cache 0.0 heads=0 of=1 key=8 value=8 policy=full storage=low_rank(key_rank=2,value_rank=2)"
    )
    with pytest.raises(IRError, match="stands for the tokens that leave a window"):
        CacheLayout.parse([line])
    line = line.replace("full", "window(sinks=0,recent=8)").replace("key_rank=2", "key_rank=9")
    with pytest.raises(IRError, match="9 features are more than the 8 channels"):
        CacheLayout.parse([line]).bytes(1, 10)  # type: ignore[union-attr]


def test_later_passes_leave_features_alone() -> None:
    found = planned(0)
    CSKV(recent=16, slack=16).run(found)
    before = found.layout
    assert [
        n.action for n in chosen("streaming_llm", sinks=1, recent=8, slack=8).run(found).notes
    ] == ["skipped"]
    assert "stored by low_rank" in StaticInt8().run(found).notes[0].what
    assert found.layout == before


def test_onnx_has_nothing_that_reads_it() -> None:
    says = r"cache\.share cskv: the target onnx has no operator .* target triton or reference"
    with pytest.raises(RecipeError, match=says):
        Recipe.build({"target": "onnx", "cache": {"share": "cskv"}})
    assert Recipe.build({"target": "triton", "cache": {"share": "cskv"}}).target == "triton"


def test_a_model_runs_with_it(tmp_path: Path) -> None:
    folder = models.save("llama", tmp_path / "model", num_hidden_layers=4)
    options = {"keep": 0.5, "recent": 8, "slack": 16}
    recipe = {"target": "reference", "cache": {"share": {"method": "cskv", **options}}}
    einfold.compile(folder, tmp_path / "out", recipe=recipe)
    model = einfold.load(tmp_path / "out", engine="reference", chunk=16)
    tokens = list(range(3, 63))
    rows = model.generate_batch([tokens, tokens[:25]], max_new_tokens=12, ignore_eos=True)
    for row, length in zip(rows, (60, 25), strict=True):
        alone = model.generate(tokens[:length], max_new_tokens=12, ignore_eos=True)
        assert alone.tokens == row.tokens
    cache = model.engine.cache
    layout = model.artifact.manifest.layout()
    assert cache.nbytes == layout.bytes(1, cache.capacity)
