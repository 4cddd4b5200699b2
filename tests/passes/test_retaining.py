"""Locret's retaining heads: what they are trained to tell, how the graph says it, and which tokens stay."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import einfold
from einfold.compiler.calibrate.observer import Found, Observer
from einfold.compiler.calibrate.observers.retaining import (
    RetainingHeads,
    largest_logits,
    network,
    site_of,
    trained,
)
from einfold.compiler.calibrate.statistics import Statistics
from einfold.compiler.ir.kv.keep.retained import Retained
from einfold.compiler.ir.kv.layout import CacheLayout, HeadGroup
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.verifier import verify
from einfold.compiler.passes.base import Pass, PassResult
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.order_heads import OrderHeads
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.kv_prune.train_retaining import TrainRetaining
from einfold.compiler.recipe import Recipe
from einfold.errors import CalibrationError, RecipeError, UnsupportedError
from einfold.runtime.cache import Cache

from .. import models
from ..hostile import forge
from ..methods import chosen
from ..programs import program, run
from . import test_order_heads

HIDDEN = 6

#: One layer of two KV heads with two query heads each; rotated, so that heads read what comes before.
BODY = """
    weight @cos : f32[64, 2]
    weight @sin : f32[64, 2]
    input %ids "input_ids" : i64[B, S]
    input %pos "position_ids" : i64[B, S]
    input %q "q" : f32[B, S, 4, 4]
    input %k "k" : f32[B, S, 2, 4]
    input %v "v" : f32[B, S, 2, 4]
    read %c "cos" : f32[64, 2]
    read %s "sin" : f32[64, 2]
    call %rq = einfold.rotary(%q, %pos, %c, %s, false) : f32[B, S, 4, 4]
    call %rk = einfold.rotary(%k, %pos, %c, %s, false) : f32[B, S, 2, 4]
    call %o = einfold.attention(%rq, %rk, %v, none, 0, 0.5, 0, 0.0) : f32[B, S, 4, 4]
    output "o" = %o
"""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Known(Statistics):
    """Statistics with given heads in place of trained ones."""

    def __init__(self, seed: int = 0, layer: int = 0, channels: int = 32) -> None:
        self.layer = layer
        self.heads = {
            "inner": drawn(HIDDEN, channels, seed=seed),
            "bias": drawn(HIDDEN, seed=seed + 1),
            "outer": drawn(2, HIDDEN, seed=seed + 2),
            "told": torch.tensor(0.5),
        }

    def of(self, program: Program, *observers: Observer) -> dict[str, Found]:
        return {site_of(self.layer): self.heads}


def attached(method: Pass, known: Known | None) -> Program:
    found = program(BODY)
    PlanCache().run(found)
    found.statistics = known
    method.run(found)
    TrainRetaining().run(found)
    AttachCache().run(found)
    verify(found, deep=True)
    return found


def said_of(known: Known, *text: Tensor) -> Tensor:
    """What the heads say of tokens [T, 2], of their queries, keys and values."""
    heads = [known.heads[part] for part in ("inner", "bias", "outer")]
    return network(torch.cat([x.flatten(-2) for x in text], -1), *heads)


def test_what_is_told_is_the_largest_logit_of_a_kv_head() -> None:
    q, k = drawn(3, 7, 4, 4), drawn(3, 5, 2, 4, seed=1)
    found = largest_logits(q, k, 0.3)
    for row, token, head in ((0, 0, 0), (1, 4, 1), (2, 2, 0)):
        logits = [
            0.3 * float(q[row, s, h] @ k[row, token, head])
            for s in range(7)
            for h in (2 * head, 2 * head + 1)
        ]
        assert float(found[row, token, head]) == pytest.approx(max(logits))


def test_heads_learn_what_can_be_told_and_say_how_much() -> None:
    """Of tokens that they did not see: an input's square is told nearly whole, and noise not at all."""
    x = drawn(4, 256, 6)
    wanted = torch.stack((x[..., 0].square() + x[..., 1], drawn(4, 256, seed=1)), -1)
    found = trained(x, wanted[..., :1], 32, 0.0, 300, 7)
    assert float(found["told"]) > 0.9
    assert float(trained(x, wanted[..., 1:], 32, 0.0, 300, 7)["told"]) < 0.1
    fresh = drawn(1, 500, 6, seed=2)
    said = network(fresh, found["inner"], found["bias"], found["outer"])[0, :, 0]
    true = fresh[0, :, 0].square() + fresh[0, :, 1]
    assert float(torch.corrcoef(torch.stack((said, true)))[0, 1]) > 0.9


def test_like_scores_of_neighbours_count() -> None:
    x = drawn(2, 128, 6)
    wanted = x[..., :1]

    def uneven(smooth: float) -> float:
        found = trained(x, wanted, 16, smooth, 300, 3)
        said = network(x, found["inner"], found["bias"], found["outer"])
        return float((said[:, 1:] - said[:, :-1]).square().mean())

    assert uneven(10.0) < 0.3 * uneven(0.0)


def test_the_same_heads_come_of_the_same_text() -> None:
    x, wanted = drawn(2, 64, 6), drawn(2, 64, 2, seed=1)
    one, two = (trained(x, wanted, 8, 0.0025, 30, 3) for _ in range(2))
    assert all(torch.equal(one[part], two[part]) for part in one)
    assert not torch.equal(one["inner"], trained(x, wanted, 8, 0.0025, 30, 4)["inner"])


def test_a_text_is_read_twice_in_rows_that_the_context_has_room_for() -> None:
    heads = RetainingHeads((0,), tokens=300)
    flat = torch.arange(1000).reshape(1, -1)
    shown = heads.reading(flat, 128)
    assert shown.shape == (4, 128)  # of 300 tokens what fills rows
    assert torch.equal(shown[:, :64], shown[:, 64:])
    assert torch.equal(shown[:, :64].flatten(), torch.arange(256))
    assert heads.reading(flat[:, :40], 1024).shape == (1, 80)
    for text, context in ((flat[:, :15], 128), (flat, 30)):
        with pytest.raises(CalibrationError, match="rows of 16 tokens or more, each read twice"):
            heads.reading(text, context)


def test_a_token_is_scored_as_it_was_before_it_is_turned() -> None:
    known = Known()
    found = attached(chosen("locret", tokens=20, slack=4), known)
    assert found.layout is not None
    assert next(iter(found.layout.lines())).endswith(
        "policy=retained(heavy=10,recent=10,slack=4,prefill=streaming,sinks=4) storage=f32"
    )
    q, k, v = drawn(2, 5, 4, 4), drawn(2, 5, 2, 4, seed=1), drawn(2, 5, 2, 4, seed=2)
    cache = Cache.allocate(found.layout, 2, 40, 5)
    cache.make_room(5)
    arrays = {name: torch.from_numpy(x) for name, x in (cache.counters | cache.buffers).items()}
    places = 30 + torch.arange(5).expand(2, 5)
    got = run(found, input_ids=places, position_ids=places, q=q, k=k, v=v, **arrays)
    assert got["query.0.0"].shape == (2, 5, 2, 1)
    torch.testing.assert_close(got["query.0.0"][..., 0], said_of(known, q, k, v))
    (name,) = [name for name in found.weights if "retaining_inner" in name]
    assert name.startswith("cache.0.retaining_inner.") and len(name.rpartition(".")[2]) == 12


class Layer:
    """A text through the one layer, step by step over a cache, and which tokens each head then holds."""

    def __init__(self, method: Pass, known: Known, total: int) -> None:
        self.program = attached(method, known)
        texts = ((4, 1), (2, 2), (2, 3))
        self.q, self.k, self.v = (drawn(1, total, heads, 4, seed=s) for heads, s in texts)
        self.said_TK = said_of(known, self.q[0], self.k[0], self.v[0])

    def held(self, prompt: int, chunk: int) -> list[list[set[int]]]:
        """The tokens of each head behind each step."""
        assert self.program.layout is not None
        total, found = self.q.shape[1], []
        cache = Cache.allocate(self.program.layout, 1, total, prompt)
        place = 0
        while place < total:
            size = min(prompt - place, chunk, cache.step_limit()) if place < prompt else 1
            cache.make_room(size)
            self._step(cache, torch.arange(place, place + size)[None])
            place += size
            if place == prompt:
                cache.settle()
            found.append(self._tokens(cache))
        return found

    def _step(self, cache: Cache, places: Tensor) -> None:
        arrays = {name: torch.from_numpy(x) for name, x in (cache.counters | cache.buffers).items()}
        text = {name: x[:, places[0]] for name, x in (("q", self.q), ("k", self.k), ("v", self.v))}
        got = run(self.program, input_ids=places, position_ids=places, **text, **arrays)
        for name, array in cache.buffers.items():
            if name in got:
                array[:] = got[name].numpy()
        cache.advance(places.shape[1], {"query.0.0": got["query.0.0"].numpy()})

    def _tokens(self, cache: Cache) -> list[set[int]]:
        """By their values, which nothing changes."""
        used = int(cache.counters["slots.0"][0])
        values_KND = torch.from_numpy(cache.buffers["cache.0.0.value"][0, :, :used])
        found = []
        for head, values_ND in enumerate(values_KND):
            same_NT = (values_ND[:, None] == self.v[0, None, :, head]).all(-1)
            assert bool((same_NT.sum(1) == 1).all())
            found.append(set(same_NT.float().argmax(1).tolist()))
        return found


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_tokens_stay_by_what_the_heads_said_of_them(prefill: str, sinks: int) -> None:
    """Of each head the newest, the first, and the best of the others by the scores they came with."""
    heavy, recent, slack, prompt = 6, 4, 3, 25
    options = {"tokens": heavy + recent, "recent": recent, "slack": slack}
    method = chosen("locret", **options, prefill=prefill, sinks=sinks)
    layer = Layer(method, Known(5), 40)
    alive: list[set[int]] = [set(), set()]
    place, differ = 0, False
    for held in layer.held(prompt, 3):
        size = min(3, prompt - place) if place < prompt else 1

        def leave(alive: list[set[int]], behind: int) -> None:
            for head, tokens in enumerate(alive):
                newest = set(range(behind - recent, behind))
                older = sorted(tokens - newest, key=lambda t: -float(layer.said_TK[t, head]))
                first = [token for token in older if token < sinks]
                rest = [token for token in older if token >= sinks]
                alive[head] = {*first, *rest[: heavy - len(first)], *newest}

        reading = prefill == "exact" and place < prompt
        if not reading and len(alive[0]) + size > heavy + recent + slack:
            leave(alive, place)
        for tokens in alive:
            tokens.update(range(place, place + size))
        place += size
        if place == prompt and len(alive[0]) > heavy + recent + slack:
            leave(alive, place)
        assert held == alive
        differ = differ or alive[0] != alive[1]
        assert all(token in tokens for tokens in alive for token in range(min(sinks, place)))
    assert differ and len(alive[0]) <= heavy + recent + slack


def test_without_weights_the_bytes_are_the_same() -> None:
    blind, seeing = (
        attached(chosen("locret", tokens=20, slack=4, hidden=HIDDEN), x) for x in (None, Known())
    )
    assert blind.layout is not None and seeing.layout is not None
    assert blind.layout.account() == seeing.layout.account()
    sizes = [
        sorted(p.weights[n].shape for n in p.weights if "retain" in n) for p in (blind, seeing)
    ]
    assert sizes[0] == sizes[1] and len(sizes[0]) == 3
    assert sum("untrained" in name for name in blind.weights) == 3


def test_options_that_cannot_be() -> None:
    for options, message in (
        ({"hidden": 0}, "locret trains heads of 1 or more hidden numbers"),
        ({"steps": 0}, "in 1 or more steps on 32 or more tokens, with smooth 0 or more, not 64, 0"),
        ({"read": 31}, "not 64, 300, 31 and 0.0025"),
        ({"smooth": -1.0}, "not 64, 300, 4096 and -1"),
        ({"tokens": 8, "recent": 8}, "leaves none to choose beside the 8 of recent"),
        ({"tokens": 8, "recent": 6}, "include the sinks, 0 or more of them, not 4; raise tokens"),
        ({"prefill": "late"}, "prefill is exact or streaming, not 'late'"),
    ):
        with pytest.raises(RecipeError, match=message):
            Recipe.build({"cache": {"prune": {"method": "locret", **options}}})
    for method in ("ada_kv:by=locret", "ada_kv:by=locret,tokens=64"):
        name, _, options = method.partition(":")
        table = dict(each.split("=") for each in options.split(","))
        with pytest.raises(
            RecipeError, match="those of locret are of each head alone; take kvzip:by"
        ):
            Recipe.build(
                {
                    "cache": {
                        "prune": {"method": name, **table, "tokens": int(table.get("tokens", 64))}
                    }
                }
            )


OPTIONS = "locret:tokens=24,slack=8,steps=20,read=64,hidden=8"


def compiled(folder: Path, out: Path, prune: Any = OPTIONS, **more: Any) -> dict[str, Tensor]:
    """The retaining heads of an artifact, by their names."""
    einfold.compile(folder, out, prune=prune, check=False, **more)
    weights = load_file(out / "weights.safetensors")
    return {name: x for name, x in weights.items() if ".retaining_" in name}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_an_interrupted_training_ends_as_one_that_was_not(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second layer is trained alone then, and every bit is the same."""
    folder = model_folder("llama")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    whole = compiled(folder, tmp_path / "whole")
    assert len(whole) == 6
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    seen: list[str] = []
    see = RetainingHeads.see

    def interrupted(self: RetainingHeads, site: Any, *values: Any) -> Found:
        seen.append(site.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return see(self, site, *values)

    monkeypatch.setattr(RetainingHeads, "see", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiled(folder, tmp_path / "broken")
    assert same(compiled(folder, tmp_path / "resumed"), whole)
    assert seen == [site_of(0), site_of(1), site_of(1)]
    compiled(folder, tmp_path / "again")
    assert len(seen) == 3  # and nothing is trained twice


def test_heads_are_taken_from_an_artifact_of_this_model_alone(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = model_folder("llama")
    whole = compiled(folder, tmp_path / "first")
    taken = f"locret:tokens=16,slack=4,hidden=8,heads={tmp_path / 'first'}"
    assert same(compiled(folder, tmp_path / "second", taken), whole)
    quantized = compiled(folder, tmp_path / "third", taken, weights="int8")
    assert same(quantized, whole)  # weights are rounded behind it

    def refused(why: str, prune: str = taken, folder: Path = folder) -> None:
        with pytest.raises(RecipeError, match=why):
            compiled(folder, tmp_path / "refused", prune)

    refused("were trained for another model .*: leave out heads", folder=model_folder("qwen2"))
    compiled(folder, tmp_path / "plain", "h2o:tokens=24")
    refused("cannot be taken, for it has none", f"locret:tokens=16,heads={tmp_path / 'plain'}")
    refused("cannot be read", f"locret:tokens=16,heads={tmp_path / 'nowhere'}")
    refused(
        "have inner .* in layer 0, where hidden=64 makes",
        f"locret:tokens=16,heads={tmp_path / 'first'}",
    )
    held = load_file(tmp_path / "first" / "weights.safetensors")
    less = {name: x for name, x in held.items() if not name.startswith("cache.1.retaining")}
    save_file(less, tmp_path / "first" / "weights.safetensors")
    refused("cannot be read: .*weights.safetensors has .* bytes, .*: it is damaged")
    weights = tmp_path / "first" / "weights.safetensors"
    outside = weights.rename(tmp_path / "outside")
    weights.symlink_to(outside)
    refused("cannot be read: .*weights.safetensors leads out of the artifact's folder")
    weights.unlink()
    os.mkfifo(weights)  # nobody ever writes to it
    refused("cannot be read: .*weights.safetensors")
    weights.unlink()
    outside.rename(weights)
    forge.seal(tmp_path / "first", None, "weights.safetensors")
    refused("leave out layer 1")
    by = "locret:sinks=1,steps=20,read=64,hidden=8"
    by_head = {"method": "kvzip", "tokens": 24, "share": 0.2, "slack": 4, "read": 32, "by": by}
    assert any(
        name.endswith(".by_group") for name in compiled(folder, tmp_path / "by_head", by_head)
    )
    refused(
        "stand in the order of its groups",
        f"locret:tokens=16,hidden=8,heads={tmp_path / 'by_head'}",
    )


@dataclass(frozen=True)
class TwoBudgets(Pass):
    """The last KV head keeps more tokens than the other, in this order of groups."""

    name = "two_budgets"

    def run(self, program: Program) -> PassResult:
        assert program.layout is not None
        (layer,) = program.layout.layers
        groups = tuple(
            HeadGroup((head,), Retained(tokens=30 - 10 * n)) for n, head in enumerate((1, 0))
        )
        program.layout = CacheLayout((replace(layer, groups=groups),))
        return PassResult(changed=True)


@pytest.mark.parametrize("between", ["", test_order_heads.SCALED])
def test_heads_in_another_order_say_the_same(between: str) -> None:
    """Where KV heads change places, so do the channels that the network reads, and what it gives."""
    body = test_order_heads.BODY.format(
        between=between, q="%mq" if between else "%q", more="", parts=test_order_heads.PARTS
    )
    said = []
    for moved in (False, True):
        found = program(body)
        PlanCache().run(found)
        TwoBudgets().run(found)
        found.statistics = Known(layer=3, channels=64)
        TrainRetaining().run(found)
        if moved:
            OrderHeads().run(found)
            assert found.layout is not None
            assert [group.heads for _, _, group in found.layout.groups()] == [(0,), (1,)]
            assert all(
                name.endswith(".by_group") for name in found.cache_weights if "bias" not in name
            )
        got = test_order_heads.attached(found)
        said.append([got[f"query.3.{group}"] for group in (0, 1)])
    for before, after in zip(*said, strict=True):
        assert before.shape == (2, 5, 1, 1) and float(before.std()) > 0.1
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_transformers_cache_refuses_it(model_folder: Callable[[str], Path]) -> None:
    model = models.build("llama")
    with pytest.raises(UnsupportedError, match="locret reads queries and keys as they are before"):
        einfold.cache_for(model, prune="locret:tokens=24,slack=4,steps=2,read=64")
