"""Steps of one token over the pages that a reader chooses, beside the operator's reference meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import einfold
from einfold.compiler.codegen.onnx.account import scratch
from einfold.compiler.codegen.onnx.target import Onnx
from einfold.compiler.ir.kv.read.pages.choosing import statistics_of
from einfold.compiler.ir.kv.read.pages.paged import Paged
from einfold.compiler.ir.kv.read.quest.reader import Quest
from einfold.compiler.ir.kv.read.reader import parse_reader
from einfold.compiler.ir.kv.read.shadowkv.reader import ShadowKV
from einfold.compiler.ir.ops import einfold_ops
from einfold.compiler.ir.program import Program, call_arguments
from einfold.compiler.recipe import Recipe
from einfold.errors import RecipeError, UnsupportedError

from ... import models
from ...programs import program
from .test_integer_attention import reference, run, session

READ = Quest(4, 0.25, 12)
LANDMARKS = ShadowKV(4, 0.25, 12, outliers=3)
BETWEEN = Quest(4, 0.25, 12, linear=0.6)

BODY = """
    weight @cos : f32[99, 8]
    weight @sin : f32[99, 8]
    weight @ks : f32[2, {size}]
    weight @vs : f32[2, {size}]
    weight @sinks : f32[6]
    input %ids "input_ids" : i64[B, S]
    input %pos "position_ids" : i64[B, S]
    input %q "q" : f32[B, S, 6, {size}]
    input %k "k" : f32[B, S, 2, {size}]
    input %v "v" : f32[B, S, 2, {value}]
    input %kc "cache.0.0.key" : {kind}[B, 2, CP4, {size}]
    input %vc "cache.0.0.value" : {kind}[B, 2, CP4, {value}]
    input %bounds "cache.0.0.bounds" : {kind}[B, 2, P4, {numbers}]
    input %past "lengths" : i64[B]
    read %cos "cos" : f32[99, 8]
    read %sin "sin" : f32[99, 8]
    read %ks "ks" : f32[2, {size}]
    read %vs "vs" : f32[2, {size}]
    read %sinks "sinks" : f32[6]
    call %a = einfold.bounded_attention(%q, %k, %v, %kc, %vc, %bounds, %past, none, {sinks}, {rotary}, \
{scales}, 0, 0.3, 0, {softcap}, false, "{read}") : (f32[B, S, 6, {value}], {kind}[B, 2, CP4, {size}], \
{kind}[B, 2, CP4, {value}], {kind}[B, 2, P4, {numbers}])
    call %o = builtin.getitem(%a, 0) : f32[B, S, 6, {value}]
    call %k2 = builtin.getitem(%a, 1) : {kind}[B, 2, CP4, {size}]
    call %v2 = builtin.getitem(%a, 2) : {kind}[B, 2, CP4, {value}]
    call %b2 = builtin.getitem(%a, 3) : {kind}[B, 2, P4, {numbers}]
    output "o" = %o
    output "cache.0.0.key" = %k2
    output "cache.0.0.value" = %v2
    output "cache.0.0.bounds" = %b2
"""


def layer(
    *,
    rotary: bool = True,
    int8: bool = False,
    sinks: bool = False,
    softcap: float = 0.0,
    size: int = 16,
    value: int = 16,
    read: Paged = READ,
) -> Program:
    text = BODY.format(
        size=size,
        value=value,
        numbers=read.bound_numbers(size),
        kind="i8" if int8 else "f32",
        rotary="%pos, %cos, %sin" if rotary else "none, none, none",
        scales="%ks, %vs" if int8 else "none, none",
        sinks="%sinks" if sinks else "none",
        softcap=softcap,
        read=read.text,
    )
    random = torch.Generator().manual_seed(1)
    angles = 6.3 * torch.rand(99, 8, generator=random)
    scales = [0.01 + 0.02 * torch.rand(2, size, generator=random) for _ in range(2)]
    return program(text, cos=angles.cos(), sin=angles.sin(), ks=scales[0], vs=scales[1])


def inputs(found: Program, slots: int, lengths: list[int], new: int, seed: int = 0) -> Any:
    """Random queries, keys and values over a cache that is filled with random numbers, and random statistics
    of pages that are not in use."""
    (node,) = found.nodes(einfold_ops.bounded_attention.default)
    reader = parse_reader(str(call_arguments(node)["read"]))
    assert isinstance(reader, Paged)
    random = np.random.default_rng(seed)
    batch, given = len(lengths), {}
    for name in ("q", "k", "v"):
        shape = found.placeholder(name).meta["val"].shape[2:]
        given[name] = random.standard_normal((batch, new, *shape), np.float32)
    for part, count in (("key", slots), ("value", slots), ("bounds", slots // 4 + 1)):
        cache = found.placeholder(f"cache.0.0.{part}").meta["val"]
        numbers = 40 * random.standard_normal((batch, 2, count, int(cache.shape[3])))
        int8 = cache.dtype == torch.int8
        numbers = numbers.clip(-128, 127).astype(np.int8) if int8 else numbers / 40
        given[f"cache.0.0.{part}"] = numbers.astype(np.int8 if int8 else np.float32)
    keys, bounds = given["cache.0.0.key"], given["cache.0.0.bounds"]
    for row, length in enumerate(lengths):
        slots = np.arange(-(-length // 4) * 4).clip(max=length - 1)
        of_pages = statistics_of(reader, torch.from_numpy(keys[row, None][:, :, slots]))
        bounds[row, :, : len(slots) // 4] = of_pages[0].numpy()
    past = np.asarray(lengths, np.int64)
    return given | {
        "input_ids": np.zeros((batch, new), np.int64),
        "position_ids": past[:, None] + np.arange(new),
        "lengths": past,
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotary": False},
        {"int8": True},
        {"sinks": True},
        {"softcap": 3.0},
        {"int8": True, "sinks": True, "softcap": 3.0, "rotary": False},
        {"read": Quest(4, 1.0, 0)},
        {"read": LANDMARKS},
        {"read": LANDMARKS, "int8": True},
        {"read": BETWEEN},
        {"read": BETWEEN, "int8": True, "sinks": True},
        {"read": ShadowKV(4, 0.25, 12, outliers=0)},
        {"read": ShadowKV(4, 0.4, 12, outliers=5), "sinks": True},  # outliers score well too
    ],
    ids=str,
)
def test_one_token_reads_what_the_reference_chooses(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Rows of many lengths, at edges of pages and of the cache, alone and together: of 14 tokens nothing is
    read but what always is, and of 48 and 50 as many pages."""
    found = layer(**options)
    made = session(found, tmp_path)
    for lengths in ([59], [63], [8], [14], [48, 50], [12, 48, 49, 63], [0, 62]):
        feeds = inputs(found, 64, lengths, 1, seed=lengths[0])
        want, got = reference(found, feeds), run(made, feeds)
        lost = most_lost(found, feeds) if options.get("int8") else 1e-5
        np.testing.assert_allclose(got["o"], want["o"], rtol=1e-4, atol=lost)
        for row, length in enumerate(lengths):
            for part in ("key", "value"):
                # It multiplies by a scale's inverse, which may fall on the other side of an edge.
                atol = 1 if options.get("int8") else 1e-6
                mine, other = (x[f"cache.0.0.{part}"][row, :, : length + 1] for x in (got, want))
                np.testing.assert_allclose(mine, other, rtol=1e-5, atol=atol)


def most_lost(found: Program, feeds: Any) -> float:
    """Of products of integers: half a step of a query's second plane, 1 / (63 * 126) of its largest number,
    times a key, in every weight."""
    scales = [found.weights[name].load().numpy() for name in ("ks", "vs")]
    steps = abs(feeds["q"]).max() * scales[0].max() / (2 * 63 * 126)
    score = 0.3 * steps * abs(feeds["cache.0.0.key"].astype(int)).sum(-1).max()
    return float(2 * np.expm1(score) * 128 * scales[1].max())


def test_small_probabilities_of_an_int8_cache_count_beside_a_large_one(tmp_path: Path) -> None:
    """One token of a probability of 0.9 and 4,095 of 2.4e-5, whose values are forty times as large."""
    found = layer(int8=True, rotary=False, read=Quest(4, 0.5, 0))
    feeds = inputs(found, 8192, [8191], 1)
    keys, values = feeds["cache.0.0.key"], feeds["cache.0.0.value"]
    keys[:] = 0
    keys[..., 0] = 1  # those of half of the pages, all alike
    keys[:, :, 4096:8188, 0] = 0
    keys[:, :, 2, 0] = 100
    values[:] = 100
    values[:, :, 2] = 3
    feeds["q"][:] = feeds["k"][:] = 0
    feeds["v"][:] = 100 * found.weights["vs"].load().numpy()
    scale = float(found.weights["ks"].load()[0, 0])
    feeds["q"][..., 0] = np.log(0.9 / 2.4e-5) / (99 * 0.3 * scale)
    feeds["cache.0.0.bounds"][:] = np.concatenate(
        [of(keys.reshape(1, 2, -1, 4, 16), axis=3) for of in (np.max, np.min)], -1
    )[:, :, [*range(2048), 2047]]
    want, got = (
        reference(found, feeds)["o"][0, 0, 0],
        run(session(found, tmp_path), feeds)["o"][0, 0, 0],
    )
    value_scale = found.weights["vs"].load()[0].numpy()
    assert (want > 2 * 3 * value_scale).all()  # more than half is of the small ones
    # Half a step of the third plane, all alike, and half a step of the query.
    lost = 0.9 / 2.4e-5 / (2 * 127**3) + np.expm1(np.log(0.9 / 2.4e-5) / (2 * 63 * 126))
    np.testing.assert_allclose(got, want, rtol=lost)


@pytest.mark.parametrize("int8", [False, True], ids=["f32", "int8"])
@pytest.mark.parametrize("read", [READ, LANDMARKS, BETWEEN], ids=["quest", "shadowkv", "linear"])
def test_statistics_are_those_of_the_reference_whatever_the_step(
    read: Paged, int8: bool, tmp_path: Path
) -> None:
    found = layer(int8=int8, read=read)
    made = session(found, tmp_path)
    for start, new in ((0, 1), (0, 5), (0, 64), (3, 9), (4, 4), (62, 2), (63, 1)):
        feeds = inputs(found, 64, [start], new, seed=start + new)
        want, got = (
            found["cache.0.0.bounds"] for found in (reference(found, feeds), run(made, feeds))
        )
        used = -(-(start + new) // 4)
        # How far keys are apart is 127 times a difference of numbers of about 1.
        most = np.full(want.shape[3], 1 if int8 else 1e-6)
        most[16:] = np.maximum(most[16:], 127 * 2**-20 * read.widens)
        error = abs(got[:, :, :used].astype(float) - want[:, :, :used])
        assert (error <= most + 1e-5 * abs(want[:, :, :used])).all()


def test_a_step_of_several_tokens_reads_everything(tmp_path: Path) -> None:
    found, whole = layer(), layer(read=Quest(4, 1.0, 0))
    feeds = inputs(found, 64, [50], 3)
    np.testing.assert_allclose(
        run(session(found, tmp_path), feeds)["o"],
        reference(whole, feeds)["o"],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("method", ["quest", "quest:linear=0.6", "shadowkv:outliers=3"])
def test_models_decode_as_the_reference_does(method: str, tmp_path: Path) -> None:
    """Token by token, over pages whose choice begins behind 12 or 24 tokens."""
    folder = models.save("llama", tmp_path / "model")
    table = f"{method}{',' if ':' in method else ':'}page=4,share=0.25,tokens=12,skip_layers=0"
    recipe = {"target": "onnx", "cache": {"read": table}}
    einfold.compile(folder, tmp_path / "a", recipe=recipe)  # 16 tokens are checked
    engines = []
    for target in ("reference", "onnx"):
        engine = einfold.load(tmp_path / "a", engine=target, threads=1).engine
        engines.append((engine, engine.allocate(1, 61)))
    apart = []
    for place in range(61):
        rows = []
        for engine, cache in engines:
            cache.make_room(1)
            ids = np.array([[3 + (7 * place) % 90]])
            rows.append(engine.step(cache, ids, np.array([[place]]), np.zeros(1, np.int64)).copy())
            cache.advance(1)
        apart.append(float(np.abs(rows[0] - rows[1]).max()))
    assert max(apart) < 1e-4


def test_portable_operators_read_no_pages() -> None:
    target = Onnx(portable=True)
    for read in (READ, LANDMARKS):
        said = f"no operator that reads the pages which {read.name} chooses"
        assert said in target.cannot_read(read)
    with pytest.raises(
        RecipeError, match=r"cache\.read quest: the portable flavour has no operator"
    ):
        Recipe.build({"onnx": {"portable": True}, "cache": {"read": "quest"}})


@pytest.mark.parametrize(
    "sizes", [{"value": 8}, {"size": 12, "value": 12, "rotary": False}], ids=str
)
def test_heads_that_the_operator_does_not_take_are_refused(
    sizes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="whose heads have a multiple of 8 numbers"):
        session(layer(**sizes), tmp_path)


def test_memory_beside_the_cache_goes_by_what_is_read() -> None:
    found = layer()
    node = next(iter(found.nodes(einfold_ops.bounded_attention.default)))
    sizes = {"B": 1, "S": 1, "CP4": 4096, "P4": 1025}
    few, all_of_it = scratch(found, node, sizes, False), 4096 * 2 * 2 * 16 * 4
    assert all_of_it / 4 < few < all_of_it
    assert scratch(found, node, sizes | {"S": 64}, False) < all_of_it / 4
