from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import einfold
from einfold.compiler.calibrate.layer_similarity import LayerSimilarity
from einfold.compiler.calibrate.statistics import Statistics
from einfold.compiler.ir.kv.layout import CacheLayout
from einfold.compiler.ir.ops import einfold_ops
from einfold.compiler.ir.verifier import verify
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.kv_quant.static_int8 import StaticInt8
from einfold.compiler.passes.kv_share.cross_layer import CrossLayer, search
from einfold.compiler.recipe import Recipe
from einfold.errors import CalibrationError, IRError, RecipeError
from einfold.runtime.cache import Cache

from .. import models
from ..greedy import all_logits
from ..methods import chosen
from ..programs import calls, program, run
from ..quick import quick

LAYER = """
    call %y{i} = einfold.linear(%x{i}, %w{i}, none) : f32[B, S, 32]
    call %p{i} = aten.split_with_sizes(%y{i}, [16, 8, 8], -1) : (f32[B, S, 16], f32[B, S, 8], f32[B, S, 8])
    call %a{i} = builtin.getitem(%p{i}, 0) : f32[B, S, 16]
    call %b{i} = builtin.getitem(%p{i}, 1) : f32[B, S, 8]
    call %c{i} = builtin.getitem(%p{i}, 2) : f32[B, S, 8]
    call %q{i} = aten.unflatten.int(%a{i}, -1, [2, 8]) : f32[B, S, 2, 8]
    call %k{i} = aten.unflatten.int(%b{i}, -1, [1, 8]) : f32[B, S, 1, 8]
    call %v{i} = aten.unflatten.int(%c{i}, -1, [1, 8]) : f32[B, S, 1, 8]
    call %rq{i} = einfold.rotary(%q{i}, %pos, %cos, %sin, false) : f32[B, S, 2, 8]
    call %rk{i} = einfold.rotary(%k{i}, %pos, %cos, %sin, false) : f32[B, S, 1, 8]
    call %o{i} = einfold.attention(%rq{i}, %rk{i}, %v{i}, none, {i}, 0.3, {window}, 0.0) : f32[B, S, 2, 8]
    call %x{n} = aten.flatten.using_ints(%o{i}, 2, 3) : f32[B, S, 16]
"""


def text(*windows: int) -> str:
    """A stack of attentions, one a window, over fused projections."""
    count = len(windows)
    head = [
        "weight @e : f32[11, 16]",
        *(f"weight @w{i} : f32[32, 16]" for i in range(count)),
        "weight @cos : f32[64, 4]",
        "weight @sin : f32[64, 4]",
        'input %ids "input_ids" : i64[B, S]',
        'input %pos "position_ids" : i64[B, S]',
        'read %e "e" : f32[11, 16]',
        *(f'read %w{i} "w{i}" : f32[32, 16]' for i in range(count)),
        'read %cos "cos" : f32[64, 4]',
        'read %sin "sin" : f32[64, 4]',
        "call %x0 = einfold.embedding(%ids, %e) : f32[B, S, 16]",
    ]
    body = [LAYER.format(i=i, n=i + 1, window=w).strip() for i, w in enumerate(windows)]
    return "\n".join([*head, *body, f'output "logits" = %x{count}'])


def planned(*windows: int):  # type: ignore[no-untyped-def]
    found = program(text(*windows))
    PlanCache().run(found)
    return found


def test_a_layer_reads_another_and_loses_its_projections() -> None:
    found = planned(0, 0)
    result = CrossLayer(layers=1).run(found)
    verify(found, deep=True)
    assert list(found.layout.lines()) == [
        "cache 0.0 heads=0 of=1 key=8 value=8 policy=full storage=f32",
        "cache 1.0 heads=0 of=1 key=8 value=8 policy=full storage=f32 owner=0",
    ]
    assert found.layout == CacheLayout.parse(list(found.layout.lines()))
    assert found.weights["w1.rows0"].shape == (16, 16) and "w1" not in found.weights
    assert result.notes[0].what == "reads the cache of layer 0: 64 bytes a token less"
    assert result.notes[0].bytes_saved == 16 * 16 * 4
    assert result.notes[1].action == "skipped" and "read by layer 1" in result.notes[1].what
    AttachCache().run(found)
    verify(found, deep=True)
    assert [c for c in calls(found) if "shared_attention" in c] == [
        "einfold.shared_attention(%16, %12, %13, %lengths, none, none, "
        "%position_ids, %cos, %sin, none, none, 1, 0.3, 0, 0.0, false)"
    ]
    assert found.output_names() == ["logits", "cache.0.0.key", "cache.0.0.value"]
    assert found.layout.bytes(2, 10) == 2 * 10 * 16 * 4


@pytest.mark.parametrize("windows", [(0, 0, 0), (3, 3, 3)])
def test_steps_over_the_cache_equal_attention_over_the_whole_text(windows: tuple[int, ...]) -> None:
    found = planned(*windows)
    CrossLayer(layers=2).run(found)
    ids, positions = torch.randint(11, (2, 9)), torch.arange(9).expand(2, -1)
    want = run(found, input_ids=ids, position_ids=positions)["logits"]
    AttachCache().run(found)
    assert found.layout is not None
    cache = Cache.allocate(found.layout, 2, 9)
    assert cache.nbytes == found.layout.bytes(2, 9) == 2 * 9 * 16 * 4
    got = []
    buffers = {name: torch.from_numpy(array) for name, array in cache.buffers.items()}
    for start, end in ((0, 4), (4, 5), (5, 9)):
        out = run(
            found,
            input_ids=ids[:, start:end],
            position_ids=positions[:, start:end],
            lengths=torch.full((2,), start),
            **buffers,
        )
        got.append(out.pop("logits"))
        buffers = out
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)


def test_readers_of_a_pruned_owner_attend_over_what_it_kept() -> None:
    found = planned(0, 0)
    CrossLayer(layers=1).run(found)
    result = chosen("streaming_llm", sinks=1, recent=4, slack=2).run(found)
    assert [note.action for note in result.notes] == ["applied", "skipped"]
    AttachCache().run(found)
    verify(found, deep=True)
    (call,) = found.nodes(einfold_ops.shared_attention.default)
    assert call.args[3].target == "slots.0"


def test_int8_goes_to_the_owner_alone() -> None:
    found = planned(0, 0)
    CrossLayer(layers=1).run(found)
    result = StaticInt8().run(found)
    assert result.notes[-1].what == "reads the cache of layer 0"
    assert sorted(found.cache_weights) == ["cache.0.0.key_scale", "cache.0.0.value_scale"]
    AttachCache().run(found)
    verify(found, deep=True)
    assert any("%cache.0.0.value_scale, 1, 0.3" in call for call in calls(found))


def test_layers_of_one_window_share() -> None:
    found = planned(0, 4, 0, 4)
    result = CrossLayer(layers=2).run(found)
    assert [layer.groups[0].owner for layer in found.layout.layers] == [None, None, 0, 1]
    with pytest.raises(RecipeError, match="asked to share 3 of 4 layers, but 2 at most"):
        CrossLayer(layers=3).run(planned(0, 4, 0, 4))
    result = CrossLayer(layers=1).run(planned(0, 4, 0))
    assert result.notes[-1].where == "layer 1"
    assert result.notes[-1].what.startswith("no earlier layer has the same heads")


def test_the_search_goes_by_rank_and_by_the_effect() -> None:
    ranked = [(0, 3), (1, 3), (0, 1), (1, 2), (2, 3), (0, 2)]
    assert search(ranked, 2, lambda owners: 1.0, 0.5) == {3: 0, 1: 0}
    # 1 may not read 0, so that 2 may read 1; 3 reads 0, so nothing else.
    assert search(ranked, 3, lambda owners: 0.0 if 1 in owners else 1.0, 0.5) == {3: 0, 2: 1}
    assert search(ranked, 3, lambda owners: 0.4, 0.5) == {}


@pytest.mark.parametrize("order", ["dissimilar", "similar"])
def test_distances_rank_the_pairs(order: str) -> None:
    found = planned(0, 0, 0)
    tokens = torch.randint(11, (4, 64))
    found.statistics = Statistics(lambda: (tokens, "a text"))
    similarity = LayerSimilarity(found, tokens)
    pairs = [(0, 1), (0, 2), (1, 2)]
    distances = similarity.distances(pairs)
    best = (max if order == "dissimilar" else min)(pairs, key=distances.__getitem__)
    closeness = similarity.closeness({best[1]: best[0]})
    assert -1 <= closeness < 0.999 and similarity.closeness({}) == pytest.approx(1)
    result = CrossLayer(layers=1, order=order, threshold=-1, rows=4).run(found)
    assert found.layout[best[1]].groups[0].owner == best[0]
    assert list(result.measured.values()) == [pytest.approx(closeness)]


def test_a_threshold_that_nothing_meets_is_reported() -> None:
    found = planned(0, 0)
    found.statistics = Statistics(lambda: (torch.randint(11, (4, 64)), "a text"))
    result = CrossLayer(layers=1, threshold=1.0).run(found)
    assert "only 0 of 1 layers share within 1.0" in result.notes[0].what
    assert all(layer.groups[0].owner is None for layer in found.layout.layers)


def test_damaged_weights_and_orders_are_refused() -> None:
    table = torch.randn(11, 16)
    table[3] = float("nan")
    found = program(text(0, 0), e=table)
    PlanCache().run(found)
    found.statistics = Statistics(lambda: (torch.full((1, 64), 3), "a text"))
    with pytest.raises(CalibrationError, match=r"(keys|values) of layer 0 are not finite"):
        CrossLayer(layers=1).run(found)
    for wrong in (float("nan"), 2.0):
        with pytest.raises(
            RecipeError, match="threshold is a cosine similarity, from -1 to 1, not"
        ):
            CrossLayer(threshold=wrong)
    with pytest.raises(RecipeError, match="dissimilar or similar pairs first"):
        Recipe.build({"cache": {"share": {"method": "cross_layer", "order": "random"}}})


@pytest.mark.parametrize(
    "lines",
    [
        ["cache 0.0 heads=0 of=1 key=8 value=8 policy=full storage=f32 owner=0"],
        [
            "cache 0.0 heads=0 of=1 key=8 value=8 policy=full storage=f32",
            "cache 1.0 heads=0 of=1 key=4 value=8 policy=full storage=f32 owner=0",
        ],
        ["cache 1.0 heads=0 of=1 key=4 value=8 policy=full storage=f32 owner=0"],
    ],
)
def test_layouts_that_read_nothing_are_refused(lines: list[str]) -> None:
    with pytest.raises(IRError, match="cache of layer"):
        CacheLayout.parse(lines)


@pytest.mark.parametrize(
    ("name", "portable"),
    quick(
        product(["llama", "gemma2", "gpt2", "qwen3"], [False, True]),
        ("llama", False),
        ("gemma2", True),
    ),
)
def test_onnx_agrees_with_the_reference(name: str, portable: bool, tmp_path: Path) -> None:
    changes = {"n_layer": 4} if name == "gpt2" else {"num_hidden_layers": 4}
    folder = models.save(name, tmp_path / "model", **changes)
    out = tmp_path / "out"
    share = {"method": "cross_layer", "layers": 2, "threshold": -1}
    recipe = Recipe.build({"cache": {"share": share}, "onnx": {"portable": portable}})
    einfold.compile(folder, out, recipe=recipe)
    model, reference = einfold.load(out, chunk=16, threads=1), einfold.load(out, engine="reference")
    tokens = np.random.default_rng(0).integers(3, models.VOCABULARY, 50).tolist()
    np.testing.assert_allclose(
        all_logits(model, tokens), all_logits(reference, tokens), rtol=2e-3, atol=2e-4
    )
    rows = model.generate_batch([tokens[:20], tokens[:9]], max_new_tokens=5, ignore_eos=True)
    assert rows[0].tokens == model.generate(tokens[:20], max_new_tokens=5, ignore_eos=True).tokens


@pytest.mark.slow
def test_a_cache_of_codes_is_read_by_three(tmp_path: Path) -> None:
    folder = models.save("llama", tmp_path / "model", num_hidden_layers=3)
    share = {"method": "cross_layer", "layers": 2, "threshold": -1}
    tokens = np.random.default_rng(0).integers(3, models.VOCABULARY, 50).tolist()
    logits = {}
    for storage in ("f32", "int8", "int4"):
        out = tmp_path / storage
        einfold.compile(folder, out, recipe={"cache": {"share": share, "storage": storage}})
        for engine in ("onnx", "reference"):
            logits[storage, engine] = all_logits(einfold.load(out, engine=engine, chunk=16), tokens)
    want = logits["f32", "reference"]
    np.testing.assert_allclose(logits["f32", "onnx"], want, rtol=2e-3, atol=2e-4)
    for engine in ("onnx", "reference"):
        error = np.square(logits["int8", engine] - want).mean() / np.square(want).mean()
        assert 1e-4 < np.sqrt(error) < 0.02
    np.testing.assert_allclose(logits["int4", "onnx"], logits["int4", "reference"], atol=2e-3)
    for storage, token in (("int8", 2 * 2 * 16), ("int4", 2 * 2 * 8)):
        small = einfold.load(tmp_path / storage, threads=1)
        names = small.engine.runner.session.get_outputs()
        assert sum("@" in node.name for node in names) == 4
        assert small.artifact.manifest.layout().bytes(1, 50) == 50 * token
