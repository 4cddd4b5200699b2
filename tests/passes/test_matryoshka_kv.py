"""MatryoshkaKV: bases of heads, what is lacking with their first directions, and whose bases they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import einfold
from einfold.compiler.calibrate.observer import Found
from einfold.compiler.calibrate.observers.head_bases import HeadBases, site_of
from einfold.compiler.calibrate.orthogonal import (
    PARTS,
    Heads,
    cayley,
    principal,
    projection,
    trained,
)
from einfold.compiler.calibrate.snapshot import all_inputs
from einfold.compiler.calibrate.statistics import Statistics
from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.program import Program, attention_nodes
from einfold.compiler.ir.verifier import verify
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.kv_share.cross_layer import CrossLayer
from einfold.compiler.passes.kv_share.head_bases import project
from einfold.compiler.passes.kv_share.matryoshka_kv import MatryoshkaKV, rank_of
from einfold.compiler.recipe import Recipe
from einfold.errors import CalibrationError, RecipeError, UnsupportedError

from .. import models
from ..hostile import forge
from ..programs import calls, program
from .test_cross_layer import planned, text

TEXT = torch.randint(11, (4, 32), generator=torch.Generator().manual_seed(0))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(heads: int, size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(drawn(heads, size, size, seed=seed)).Q


def with_text(*windows: int) -> Program:
    found = planned(*windows)
    found.statistics = Statistics(lambda: (TEXT, "a text"))
    return found


def logits(found: Program) -> Tensor:
    return Interpreter(found).run(all_inputs(found, TEXT))["logits"]


def test_heads_have_fewer_channels_in_graph_and_layout() -> None:
    found = with_text(0, 4)
    result = MatryoshkaKV(key_keep=0.5, value_keep=0.25, steps=2).run(found)
    verify(found, deep=True)
    assert found.layout is not None
    assert list(found.layout.lines()) == [
        f"cache {layer}.0 heads=0 of=1 key=4 value=2 policy=full storage=f32" for layer in (0, 1)
    ]
    assert [note.what.partition(";")[0] for note in result.notes] == [
        "24 bytes a token, from 64"
    ] * 2
    assert found.layout.bytes(1, 10) == 2 * 10 * 24
    mark = next(iter(name for name in found.weights if "key_basis" in name)).rpartition(".")[2]
    assert len(mark) == 12
    made = [call.replace(f".{mark}", "") for call in calls(found)]
    first = made.index("aten.matmul.default(%12, %cache.0.query_basis)")
    assert made[first + 3] == "aten.matmul.default(%15, %cache.0.key_basis)"
    assert made[first + 5 : first + 10] == [
        "aten.sub.Tensor(%9, %cache.0.value_mean)",
        "aten.transpose.int(%18, 1, 2)",
        "aten.matmul.default(%19, %cache.0.value_basis)",
        "aten.transpose.int(%20, 1, 2)",
        "einfold.attention(%14, %17, %21, none, 0, 0.3, 0, 0.0)",
    ]
    assert made[first + 11] == "aten.matmul.default(%23, %cache.0.output_basis)"
    AttachCache().run(found)
    verify(found, deep=True)


def test_all_directions_of_any_basis_give_the_model_back() -> None:
    want, found = logits(planned(0, 3)), planned(0, 3)
    for node, seed in zip(attention_nodes(found), (1, 2), strict=True):
        whole = {"key": orthogonal(1, 8, seed), "value": orthogonal(1, 8, 9), "mean": drawn(1, 8)}
        project(found, node, whole, "mark")
    torch.testing.assert_close(logits(found), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rest", ["", "sinks", "softcap"])
def test_the_graph_lacks_what_training_counts(rest: str) -> None:
    """What attention gives of its projected heads is what `Heads.output` says of projections, KV heads with
    several query heads; means are in neither way's way."""
    shapes = (4, 2, 2)
    q, k, v = (drawn(2, 9, heads, 8, seed=seed) for seed, heads in enumerate(shapes))
    k, v = k + 3, v - 2
    sinks = drawn(4) if rest == "sinks" else None
    softcap = 5.0 if rest == "softcap" else 0.0
    given = "%s" if rest == "sinks" else "none"
    body = f"""
        weight @s : f32[4]
        input %q "q" : f32[B, S, 4, 8]
        input %k "k" : f32[B, S, 2, 8]
        input %v "v" : f32[B, S, 2, 8]
        read %s "s" : f32[4]
        call %o = einfold.attention(%q, %k, %v, {given}, 0, 0.4, 5, {softcap}) : f32[B, S, 4, 8]
        output "o" = %o
    """
    found = program(body, **({} if sinks is None else {"s": sinks}))
    heads = Heads(q, k, v, 0.4, 5, softcap, sinks)
    bases = {"key": orthogonal(2, 8), "value": orthogonal(2, 8, 1)}
    parts = torch.tensor(3)
    cut = {part: basis[..., :3] for part, basis in bases.items()} | {"mean": heads.mean()}
    project(found, attention_nodes(found)[0], cut, "mark")
    got = Interpreter(found).run({"q": q, "k": k, "v": v})["o"]
    near = [projection(basis, parts.expand(2)) for basis in bases.values()]
    places = torch.arange(9)
    for row in (0, 1):
        want = (
            heads.centred().output(row, places, *near)
            + heads.mean().repeat_interleave(2, 0).flatten()
        )
        torch.testing.assert_close(got[row].flatten(1), want, rtol=1e-4, atol=1e-4)


def crossed() -> Heads:
    """Queries look where keys vary least, and the output's weight reads where values do."""
    falling = torch.logspace(0.6, -0.6, 16)
    k = drawn(2, 128, 1, 16) * falling
    q = drawn(2, 128, 2, 16, seed=1) * falling.flip(0) ** 2
    v = drawn(2, 128, 1, 16, seed=2) * falling
    return Heads(q, k, v, 0.1, output_MN=torch.diag(falling.flip(0) ** 2).repeat(1, 2))


def test_training_finds_the_directions_that_count() -> None:
    found = trained(crossed(), 100, 0)
    assert bool((found["error"] < 0.8 * found["start"]).all())
    for part in ("key", "value"):
        product = found[part].mT @ found[part]
        torch.testing.assert_close(product, torch.eye(16)[None], rtol=0, atol=1e-4)


def test_one_basis_serves_every_number_of_directions() -> None:
    """One that was trained for half of them alone is of less use with more."""
    heads = crossed()
    nested, half = trained(heads, 100, 0), trained(heads, 100, 0, drawn=(PARTS // 2,))
    assert float(half["error"][3]) < 0.8 * float(half["start"][3])
    assert bool((half["error"][4:] > 1.2 * nested["error"][4:]).all())


def test_a_basis_that_is_worse_on_other_text_is_not_taken() -> None:
    """Of noise there is nothing to learn: the principal directions stay, or what is no worse."""
    q, k, v = (drawn(1, 64, 1, 8, seed=seed) for seed in range(3))
    found = trained(Heads(q, k, v, 1.0), 50, 0)
    shown = [0, 1, 3, 5]
    assert float(found["error"][shown].log().mean()) <= float(found["start"][shown].log().mean())


def test_what_is_lacking_is_told_of_each_head() -> None:
    heads = crossed()
    twice = replace(
        heads,
        q_BSHD=torch.cat((heads.q_BSHD, 0.01 * heads.q_BSHD), 2),
        k_BSKD=heads.k_BSKD.repeat(1, 1, 2, 1),
        v_BSKE=heads.v_BSKE.repeat(1, 1, 2, 1),
        output_MN=None,
    )
    found = trained(twice, 0, 0)
    assert found["key_error"].shape == found["value_error"].shape == (2, PARTS - 1)
    # Queries of the second are so small that its keys hardly count.
    assert float(found["key_error"][0, 0]) > 10 * float(found["key_error"][1, 0])


def test_principal_directions_and_rotations() -> None:
    x = drawn(2, 50, 3, 8) * torch.logspace(0, -2, 8)
    basis = principal(x)
    kept = x.flatten(0, 1).transpose(0, 1) @ basis
    assert bool((kept.square().mean(1).diff() < 0).all())
    turned = cayley(drawn(3, 8, 8))
    torch.testing.assert_close(turned @ turned.mT, torch.eye(8).expand(3, 8, 8), rtol=0, atol=1e-5)
    assert torch.equal(cayley(torch.zeros(1, 4, 4)), torch.eye(4)[None])
    assert [rank_of(share, 64) for share in (0.01, 0.2, 0.5, 0.99)] == [8, 16, 32, 56]


def test_the_same_bases_come_of_the_same_text() -> None:
    one, two, other = (trained(crossed(), 30, seed) for seed in (3, 3, 4))
    assert all(torch.equal(one[part], two[part]) for part in one)
    assert not torch.equal(one["key"], other["key"])


def test_a_text_is_read_in_rows_that_the_context_has_room_for() -> None:
    observer = HeadBases({0: None}, tokens=300)
    assert observer.reading(torch.arange(1000)[None], 128).shape == (2, 128)
    assert observer.reading(torch.arange(40)[None], 1024).shape == (1, 40)
    for given, context in ((torch.arange(15)[None], 128), (torch.arange(100)[None], 12)):
        with pytest.raises(CalibrationError, match="rows of 16 tokens or more"):
            observer.reading(given, context)


def test_what_is_lacking_is_counted_behind_the_weight_that_reads_heads() -> None:
    """Of a model's layers it is found; heads of the stack here are read by a linear of other things too."""
    found = program(text(0))
    PlanCache().run(found)
    assert HeadBases({0: "w0"}).sites(found)[0].more[2] is not None
    assert HeadBases({0: None}).sites(found)[0].more[2] is None
    assert not HeadBases({}).sites(found)


def test_layers_that_are_left_alone() -> None:
    found = with_text(0, 0)
    CrossLayer(layers=1, threshold=-1.0).run(found)
    notes = MatryoshkaKV(steps=0).run(found).notes
    assert [(note.action, note.what) for note in notes] == [
        ("skipped", "its cache is read by layer 1 too"),
        ("skipped", "an earlier pass decided how it is cached"),
    ]


def test_sizes_are_known_without_weights() -> None:
    found, with_weights = planned(0), with_text(0)
    notes = MatryoshkaKV(keep=0.25).run(found).notes
    assert notes[0].what == "without weights they are not trained; only sizes count"
    MatryoshkaKV(keep=0.25, steps=0).run(with_weights)
    assert found.layout == with_weights.layout
    assert "cache.0.key_basis.untrained" in found.weights


def test_what_makes_no_sense_is_refused() -> None:
    for options, reason in (
        ({"keep": 1.0}, "share of the channels between 0 and 1, not 1.0"),
        ({"value_keep": 0.0}, "share of the channels between 0 and 1, not 0.0"),
        ({"steps": -1}, "in 0 or more steps, not -1"),
        ({"read": 15}, "reads 16 or more tokens of the calibration text, not 15"),
    ):
        with pytest.raises(RecipeError, match=reason):
            Recipe.build({"cache": {"share": {"method": "matryoshka_kv", **options}}})


OPTIONS = "matryoshka_kv:keep=0.5,steps=4,read=64"


def compiled(folder: Path, out: Path, share: Any = OPTIONS, **more: Any) -> dict[str, Tensor]:
    """The bases of an artifact, by their names."""
    recipe = {"cache": {"share": share}, "calibration": {"tokens": 512}, **more}
    einfold.compile(folder, out, recipe=recipe, check=False)
    weights = load_file(out / "weights.safetensors")
    return {name: x for name, x in weights.items() if "_basis." in name or "_mean." in name}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_an_interrupted_training_ends_as_one_that_was_not(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second layer is trained alone then, and every bit is the same; another number of directions takes
    no training."""
    folder = model_folder("llama")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    whole = compiled(folder, tmp_path / "whole")
    assert len(whole) == 12
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    seen: list[str] = []
    see = HeadBases.see

    def interrupted(self: HeadBases, site: Any, *values: Any) -> Found:
        seen.append(site.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return see(self, site, *values)

    monkeypatch.setattr(HeadBases, "see", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiled(folder, tmp_path / "broken")
    assert same(compiled(folder, tmp_path / "resumed"), whole)
    assert seen == [site_of(0), site_of(1), site_of(1)]
    fewer = compiled(folder, tmp_path / "fewer", "matryoshka_kv:keep=0.25,steps=4,read=64")
    assert len(seen) == 3
    for name, x in fewer.items():
        if ".key_basis." in name:
            assert x.shape == (2, 16, 4) and torch.equal(x, whole[name][..., :4])


def test_bases_are_taken_from_an_artifact_of_this_model_alone(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, first = model_folder("llama"), tmp_path / "first"
    whole = compiled(folder, first)
    taken = f"matryoshka_kv:keep=0.5,bases={first}"
    assert same(compiled(folder, tmp_path / "second", taken), whole)
    assert same(compiled(folder, tmp_path / "third", taken, weights="int8"), whole)
    less = f"matryoshka_kv:keep=0.25,bases={first}"
    fewer = compiled(folder, tmp_path / "fewer", less)
    assert all(torch.equal(x, whole[name][..., :4]) for name, x in fewer.items() if "key_b" in name)

    def refused(why: str, share: str = taken, folder: Path = folder) -> None:
        with pytest.raises(RecipeError, match=why):
            compiled(folder, tmp_path / "refused", share)

    refused("were trained for another model .*: leave out bases", folder=model_folder("qwen2"))
    refused(
        "have 8 directions of the keys of layer 0, fewer than the 12",
        f"matryoshka_kv:bases={first}",
    )
    compiled(folder, tmp_path / "plain", None)
    refused("cannot be taken, for it has none", f"matryoshka_kv:bases={tmp_path / 'plain'}")
    refused("cannot be read", f"matryoshka_kv:bases={tmp_path / 'nowhere'}")
    weights = first / "weights.safetensors"
    held = load_file(weights)
    save_file({name: x for name, x in held.items() if not name.startswith("cache.1.")}, weights)
    refused("cannot be read: .*weights.safetensors has .* bytes, .*: it is damaged")
    forge.seal(first, None, "weights.safetensors")
    refused("leave out layer 1")
    weights.unlink()
    os.mkfifo(weights)  # nobody ever writes to it
    refused("cannot be read: .*weights.safetensors")


@pytest.mark.parametrize(
    ("name", "cache", "target"),
    [
        ("llama", {}, "onnx"),
        ("llama", {"storage": "int8"}, "onnx"),
        ("llama", {"storage": "int8", "prune": "h2o:tokens=24,slack=4"}, "onnx"),
        ("qwen3", {"quant": "kivi:group=8,residual=8,slack=4"}, "reference"),
        ("gpt2", {}, "onnx"),
        ("gpt_oss", {}, "onnx"),
        ("mistral", {}, "onnx"),
    ],
)
def test_models_run_with_it(
    name: str,
    cache: dict[str, Any],
    target: str,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """The target agrees with the reference, which is checked while it is compiled; in steps as at once; and
    the cache has the bytes of the account."""
    values = 8 if cache else 12  # codes want one size of keys and values
    share = {
        "method": "matryoshka_kv",
        "keep": 0.5,
        "steps": 2,
        "read": 64,
        "value_keep": values / 16,
    }
    recipe = {"target": target, "cache": {"share": share, **cache}, "calibration": {"tokens": 256}}
    einfold.compile(model_folder(name), tmp_path / "out", recipe=recipe)
    model = einfold.load(tmp_path / "out", threads=1, chunk=16)
    tokens = np.random.default_rng(0).integers(3, models.VOCABULARY, 60).tolist()
    layout = model.artifact.manifest.layout()
    assert {(layer.key_size, layer.value_size) for layer in layout.layers} == {(8, values)}
    model.generate(tokens, max_new_tokens=4, ignore_eos=True)
    cache_held = model.engine.cache
    assert cache_held.nbytes == layout.bytes(1, cache_held.capacity)
    known = einfold.estimate(model_folder(name), recipe=recipe)
    assert (
        known.cache == einfold.inspect(tmp_path / "out").cache
        if hasattr(einfold, "inspect")
        else known
    )


def test_transformers_cache_refuses_it() -> None:
    with pytest.raises(
        UnsupportedError, match="matryoshka_kv turns queries and what attention gives"
    ):
        einfold.cache_for(models.build("llama"), share="matryoshka_kv:steps=0,read=64")
