from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import einfold
from einfold.compiler.ir.kv.codes.codec import decode
from einfold.compiler.ir.kv.layout import CacheLayout, HeadGroup, LayerCache
from einfold.compiler.ir.kv.store.minicache.codec import (
    directions,
    distance,
    distinct,
    encode_pair,
    slerp,
)
from einfold.compiler.ir.kv.store.minicache.storage import MiniCache as Storage
from einfold.compiler.ir.verifier import verify
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.kv_share.cross_layer import CrossLayer
from einfold.compiler.recipe import Recipe
from einfold.errors import IRError, RecipeError
from einfold.runtime.cache import Cache

from .. import models
from ..methods import chosen
from ..programs import calls, run
from .test_cross_layer import planned


@given(st.integers(2, 9), st.floats(0, 1), st.integers(0, 9))
def test_slerp_divides_the_arc(size: int, t: float, seed: int) -> None:
    pair = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(seed)).double()
    (a, _), (b, _) = directions(pair[0]), directions(pair[1])
    merged = slerp(a, b, t)
    torch.testing.assert_close(merged.norm(dim=-1), torch.ones(3).double())
    whole, left = distance(a, b), distance(a, merged)
    apart = whole < 0.99  # opposite directions have no one arc
    torch.testing.assert_close(left[apart], (t * whole)[apart], atol=1e-6, rtol=1e-4)


def test_slerp_of_equal_opposite_and_empty_directions() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(
        slerp(a, b, 0.6), torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    )


def test_the_most_distant_tokens_are_retained_up_to_the_capacity() -> None:
    far = torch.tensor([0.1, 0.50, 0.2, 0.49, 0.485])
    assert distinct(far, 0.05, 3).tolist() == [1, 3, 4]
    assert distinct(far, 0.05, 2).tolist() == [1, 3]  # the least distant is merged
    assert distinct(far, 0.0, 3).tolist() == [1, -1, -1]


@pytest.mark.parametrize("retained", [0, 3])
def test_decoding_gives_lengths_exactly_and_retained_tokens_whole(retained: int) -> None:
    storage = Storage(group=8, rows=retained, gamma=0.3)
    generator = torch.Generator().manual_seed(0)
    keys, values = (
        tuple(torch.randn(2, 3, 8, size, generator=generator) for _ in range(2)) for size in (6, 4)
    )
    first, second = encode_pair(storage, keys, values)
    lent = {name: piece for name, piece in first.items() if name in storage.shared}
    for layer, pieces in ((0, first), (1, lent | second)):
        for part, got, whole in zip(
            ("key", "value"), decode(storage, pieces), (keys, values), strict=True
        ):
            want = whole[layer]
            torch.testing.assert_close(got.norm(dim=-1), want.norm(dim=-1))
            merged = slerp(directions(whole[0])[0], directions(whole[1])[0], 0.6)
            merged = merged * want.norm(dim=-1, keepdim=True)
            kept = torch.zeros(want.shape[:-1], dtype=torch.bool)
            if retained:
                place = first[f"{part}_place"].squeeze(-1).long()
                for at in torch.cartesian_prod(torch.arange(2), torch.arange(3)):
                    kept[(*at,)][place[(*at,)][place[(*at,)] >= 0]] = True
                assert kept.any(-1).all()
            torch.testing.assert_close(got, torch.where(kept[..., None], want, merged))


def test_retained_tokens_that_float16_has_no_room_for_are_cut() -> None:
    storage = Storage(group=8, rows=3, gamma=0.3, dtype="f16")
    generator = torch.Generator().manual_seed(0)
    a, b = (1e6 * torch.randn(2, 3, 8, 4, generator=generator) for _ in range(2))
    first, second = encode_pair(storage, (a, b), (b, a))
    for pieces in (first, first | second):
        assert all(bool(torch.isfinite(x).all()) for x in decode(storage, pieces))
    assert float(first["key_kept"].max()) == torch.finfo(torch.float16).max


SMALL = {"group": 2, "sinks": 0, "residual": 3, "slack": 2, "retained": 0.5, "start": 0}


def test_adjacent_layers_are_paired() -> None:
    found = planned(0, 0, 0, 0, 0)
    result = chosen("minicache", group=8, residual=8, slack=8).run(found)
    storage = (
        "minicache(residual=8,slack=8,prefill=exact,sinks=4,group=8,rows=1,slerp=0.6,gamma=0.05,"
        "dtype=f32)"
    )
    assert list(found.layout.lines())[2:] == [
        "cache 2.0 heads=0 of=1 key=8 value=8 policy=full storage=f32",
        f"cache 3.0 heads=0 of=1 key=8 value=8 policy=full storage={storage}",
        f"cache 4.0 heads=0 of=1 key=8 value=8 policy=full storage={storage} partner=3",
    ]
    assert CacheLayout.parse(list(found.layout.lines())) == found.layout
    assert [note.action for note in result.notes] == ["skipped"] * 3 + ["applied"]
    # 16 numbers of direction and 4 lengths a token; 2 x 16 kept numbers and 2 places in 8 tokens
    assert result.notes[3].what.startswith(f"{(16 + 4) * 4 + (32 + 2) * 4 / 8:g} bytes a merged")
    AttachCache().run(found)
    verify(found, deep=True)
    (last,) = [c for c in calls(found) if "packed_attention" in c and ", 4, 0.3" in c]
    assert "%slots.0, %packed.0, [%cache.3.0.key_direction, %cache.4.0.key_length" in last
    assert "%cache.3.0.key_place" in last and "%cache.4.0.key_kept" in last


def test_windows_and_lone_layers_are_skipped_and_a_short_context_refused() -> None:
    found = planned(0, 0, 4, 0, 0)
    result = chosen("minicache", start=0.4, group=8, residual=8, slack=8).run(found)
    reasons = {note.where: note.what for note in result.notes}
    assert reasons["layer 2"] == "layer 2 has a sliding window of 4 tokens of its own"
    assert [layer.groups[0].partner for layer in found.layout.layers] == [None] * 4 + [3]
    with pytest.raises(
        RecipeError, match=r"12 tokens and up to 56 that wait .* nothing would be merged"
    ):
        chosen("minicache", group=8, residual=8, slack=49).run(planned(0, 0))
    small = {"group": 8, "residual": 8, "slack": 8}
    for windows, start, reason in (
        ((0, 4, 0, 4), 0.0, "layer 0: layer 1 has a sliding window of 4 tokens of its own"),
        ((0, 0), 0.5, "layer 1: has no layer behind it to pair with"),
        ((0, 0), 0.9, "layer 1: is before layer 2, where pairs begin"),
    ):
        with pytest.raises(RecipeError, match=f"no two adjacent layers .*{reason}.* lower start"):
            chosen("minicache", start=start, **small).run(planned(*windows))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="slerp and gamma are shares"):
        chosen("minicache", slerp=1.5)
    with pytest.raises(RecipeError, match="start is a share"):
        chosen("minicache", start=1)


@given(
    st.integers(1, 4),
    st.integers(0, 4),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from(["exact", "streaming"]),
    st.integers(0, 3),
    st.sampled_from(["f32", "f16"]),
    st.data(),
)
def test_both_layers_of_a_pair_are_merged_together(
    group: int,
    residual: int,
    slack: int,
    retained: float,
    prefill: str,
    sinks: int,
    dtype: str,
    data: st.DataObject,
) -> None:
    """Whatever the steps: bulk and slots hold each token once, merged as the whole text would be."""
    storage = Storage(
        residual, slack, prefill, sinks, group, int(retained * group), 0.6, 0.05, dtype
    )
    layers = tuple(
        LayerCache(i, 2, 4, 4, (HeadGroup((0, 1), storage=storage, partner=p),))
        for i, p in ((0, None), (1, 0))
    )
    layout, total = CacheLayout(layers), data.draw(st.integers(1, 24))
    prompt = data.draw(st.integers(1, total))
    cache = Cache.allocate(layout, 1, total, prompt)
    text = np.random.default_rng(0).standard_normal((2, 2, 2, total, 4)).astype(np.float32)
    seen = 0
    while seen < total:
        if seen == prompt:
            peak = layout.peak_bytes(1, total, prompt)
            assert cache.nbytes == layout.bytes(1, total, prompt) <= peak
            cache.settle()
            assert cache.nbytes == layout.bytes(1, total) <= peak
        end = prompt if seen < prompt else total
        size = data.draw(st.integers(1, min(end - seen, cache.step_limit())))
        cache.make_room(size)
        used = int(cache.clocks["slots.0"][0])
        for layer in (0, 1):
            for index, part in enumerate(("key", "value")):
                slots = cache.buffers[f"cache.{layer}.0.{part}"][0]
                slots[:, used : used + size] = text[layer, index, :, seen : seen + size]
        cache.advance(size)
        seen += size
    if seen == prompt:
        cache.settle()
    packed, used = int(cache.packed["packed.0"][0]), int(cache.clocks["slots.0"][0])
    assert packed + used == total and packed % group == 0
    first, behind = min(sinks, total), sinks + packed
    cut = [
        tuple(
            torch.from_numpy(text[layer, i, :, sinks:behind]).unflatten(1, (-1, group))
            for layer in (0, 1)
        )
        for i in (0, 1)
    ]
    for layer in (0, 1):
        for index, part in enumerate(("key", "value")):
            slots = cache.buffers[f"cache.{layer}.0.{part}"][0]
            np.testing.assert_array_equal(slots[:, :first], text[layer, index, :, :first])
            np.testing.assert_array_equal(slots[:, first:used], text[layer, index, :, behind:])
    if packed:
        for layer, want in enumerate(encode_pair(storage, cut[0], cut[1])):
            for name, piece in want.items():
                bulk = cache.buffers[f"cache.{layer}.0.{name}"][0, :, : packed // group]
                np.testing.assert_allclose(bulk, piece.numpy(), rtol=1e-3, atol=1e-5)


def test_attention_reads_what_is_merged() -> None:
    """The deeper layer's call equals attention over its decoded and its plain tokens."""
    found = planned(0, 0)
    chosen("minicache", **SMALL).run(found)
    AttachCache().run(found)
    cache = Cache.allocate(found.layout, 1, 20, 12)
    ids = torch.randint(11, (1, 20), generator=torch.Generator().manual_seed(0))

    def step(start: int, end: int) -> torch.Tensor:
        cache.make_room(end - start)
        counters = cache.counters | cache.buffers
        inputs = {name: torch.from_numpy(array) for name, array in counters.items()}
        positions = torch.arange(start, end)[None]
        out = run(found, input_ids=ids[:, start:end], position_ids=positions, **inputs)
        for name in cache.buffers.keys() & out.keys():
            cache.buffers[name][:] = out[name].numpy()
        cache.advance(end - start)
        return out["logits"]

    whole = planned(0, 0)
    want = run(whole, input_ids=ids, position_ids=torch.arange(20)[None])["logits"]
    torch.testing.assert_close(step(0, 12), want[:, :12], rtol=1e-4, atol=1e-4)
    cache.settle()
    got = torch.cat([step(place, place + 1) for place in range(12, 20)], 1)
    assert int(cache.packed["packed.0"][0]) >= 12
    error = (got - want[:, 12:]).norm() / want[:, 12:].norm()
    assert 0.01 < error < 1.0
    assert bool(torch.isfinite(got).all())


@pytest.mark.parametrize(
    "partner", ["", " partner=1", " partner=7"], ids=["none", "itself", "absent"]
)
def test_a_layer_without_a_partner_is_refused(partner: str) -> None:
    storage = "minicache(group=8)"
    lines = [
        "cache 0.0 heads=0 of=1 key=8 value=8 policy=full storage=f32",
        f"cache 1.0 heads=0 of=1 key=8 value=8 policy=full storage={storage}{partner}",
    ]
    with pytest.raises(IRError, match="cache of layer 1"):
        CacheLayout.parse(lines)


def test_a_stack_is_one_layout() -> None:
    """A deep layer pair merged, the others pruned or packed, and what does not fit said so."""
    found = planned(0, 0, 0, 0)
    chosen("minicache", group=8, residual=8, slack=8).run(found)
    pruned = chosen("streaming_llm", sinks=1, recent=8, slack=8).run(found)
    packed = chosen("kivi", bits=4, group=8, residual=8, slack=4).run(found)
    assert [n.action for n in pruned.notes] == ["applied", "applied", "skipped", "skipped"]
    assert all(note.action == "skipped" for note in packed.notes)
    assert "packed by minicache already" in packed.notes[3].what
    AttachCache().run(found)
    verify(found, deep=True)


def test_a_reader_attends_over_packed_tokens_of_its_owner() -> None:
    found = planned(0, 0, 0)
    CrossLayer(layers=2).run(found)
    chosen("kivi", bits=8, group=8, residual=8, slack=4).run(found)
    AttachCache().run(found)
    verify(found, deep=True)
    assert sum("packed_attention(%" in c and ", none, none, %" in c for c in calls(found)) == 2


def test_a_target_that_cannot_read_it_refuses() -> None:
    says = (
        r"minicache: the target onnx has no operator .* compile for the target triton or reference"
    )
    with pytest.raises(RecipeError, match=says):
        Recipe.build({"cache": {"share": "minicache"}})
    Recipe.build({"target": "triton", "cache": {"share": "minicache"}})


def test_a_model_runs_with_it(tmp_path: Path) -> None:
    folder = models.save("llama", tmp_path / "model", num_hidden_layers=4)
    options = {"group": 8, "residual": 8, "slack": 16}
    recipe = {"target": "reference", "cache": {"share": {"method": "minicache", **options}}}
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
