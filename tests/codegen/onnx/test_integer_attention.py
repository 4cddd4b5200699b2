"""Decode steps over an int8 cache in products of integers, beside the operator's reference meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import einfold
from einfold.compiler.analysis.liveness import peak_activation_bytes
from einfold.compiler.codegen.onnx import integer_attention, one_token
from einfold.compiler.codegen.onnx.attention_bytes import WIDENED_FROM
from einfold.compiler.codegen.onnx.lower import lower
from einfold.compiler.codegen.onnx.runner import two_numbers
from einfold.compiler.codegen.onnx.target import Onnx
from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.parser import parse
from einfold.compiler.ir.printer import print_program
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.weights import Weight
from einfold.compiler.ir.weights_file import write_weights

from ... import models
from ...programs import program
from ...quick import rarely

CACHED = """
    weight @cos : f32[9100, {half}]
    weight @sin : f32[9100, {half}]
    weight @ks : f32[{kv}, {size}]
    weight @vs : f32[{kv}, {size}]
    weight @sinks : f32[{heads}]
    input %ids "input_ids" : i64[B, S]
    input %pos "position_ids" : i64[B, S]
    input %q "q" : f32[B, S, {heads}, {size}]
    input %k "k" : f32[B, S, {kv}, {size}]
    input %v "v" : f32[B, S, {kv}, {size}]
    input %kc "cache.0.0.key" : {kind}[B, {kv}, C, {size}]
    input %vc "cache.0.0.value" : {kind}[B, {kv}, C, {size}]
    input %past "lengths" : i64[B]
    read %cos "cos" : f32[9100, {half}]
    read %sin "sin" : f32[9100, {half}]
    read %ks "ks" : f32[{kv}, {size}]
    read %vs "vs" : f32[{kv}, {size}]
    read %sinks "sinks" : f32[{heads}]
    call %a = einfold.cached_attention(%q, %k, %v, %kc, %vc, %past, none, {sinks}, {rotary}, {scales}, \
0, {scale}, {window}, {softcap}, {pairing}) : (f32[B, S, {heads}, {size}], {kind}[B, {kv}, C, {size}], \
{kind}[B, {kv}, C, {size}])
    call %o = builtin.getitem(%a, 0) : f32[B, S, {heads}, {size}]
    call %k2 = builtin.getitem(%a, 1) : {kind}[B, {kv}, C, {size}]
    call %v2 = builtin.getitem(%a, 2) : {kind}[B, {kv}, C, {size}]
    output "o" = %o
    output "cache.0.0.key" = %k2
    output "cache.0.0.value" = %v2
"""


def layer(
    heads: int,
    kv: int,
    size: int,
    *,
    half: int = 0,
    pairing: str = "false",
    scale: float | None = None,
    key_scale: torch.Tensor | None = None,
    kind: str = "i8",
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
) -> Program:
    """One attention over a cache of int8, or of another kind; rotary of 2 * half coordinates where half is
    given."""
    rotary = "%pos, %cos, %sin" if half else "none, none, none"
    text = CACHED.format(
        heads=heads,
        kv=kv,
        size=size,
        half=half or 1,
        rotary=rotary,
        pairing=pairing,
        kind=kind,
        scales="%ks, %vs" if kind == "i8" else "none, none",
        window=window,
        softcap=softcap,
        sinks="%sinks" if sinks else "none",
        scale=scale or size**-0.5,
    )
    random = torch.Generator().manual_seed(1)
    angles = 6.3 * torch.rand(9100, half or 1, generator=random)
    scales = [0.01 + 0.02 * torch.rand(kv, size, generator=random) for _ in range(2)]
    if key_scale is not None:
        scales[0] = key_scale
    weights = {"ks": scales[0], "vs": scales[1], "sinks": torch.randn(heads, generator=random)}
    return program(text, cos=angles.cos(), sin=angles.sin(), **weights)


def session(found: Program, folder: Path, profile: bool = False) -> Any:
    copies = {name: found.weights[name].load() for name in found.weights}
    again = parse(print_program(found), lambda name, declared: Weight.of(copies[name]))
    placements, _ = write_weights(again.weights, folder / "w.safetensors")
    ir.save(lower(again, "w.safetensors", placements), folder / "m.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = profile
    options.profile_file_prefix = str(folder / "profile")
    return ort.InferenceSession(str(folder / "m.onnx"), options)


def inputs(
    found: Program, slots: int, lengths: list[int], new: int = 1, seed: int = 0
) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)
    query, key = (found.placeholder(name).meta["val"].shape for name in ("q", "k"))
    batch = len(lengths)

    def normal(shape: Any) -> np.ndarray[Any, Any]:
        return random.standard_normal((batch, new, *shape[2:]), np.float32)

    def cache() -> np.ndarray[Any, Any]:
        shape = (batch, key[2], slots, key[3])
        if found.placeholder("cache.0.0.key").meta["val"].dtype == torch.int8:
            return random.integers(-128, 128, shape, np.int8)
        return random.standard_normal(shape, np.float32)

    past = np.asarray(lengths, np.int64)
    return {
        "input_ids": np.zeros((batch, new), np.int64),
        "position_ids": past[:, None] + np.arange(new),
        "q": normal(query),
        "k": normal(key),
        "v": normal(key),
        "cache.0.0.key": cache(),
        "cache.0.0.value": cache(),
        "lengths": past,
    }


def run(found: Any, feeds: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    read = {node.name for node in found.get_inputs()}
    names = [node.name.removeprefix("present.") for node in found.get_outputs()]
    given = found.run(None, {name: array for name, array in feeds.items() if name in read})
    return dict(zip(names, given, strict=True))


def reference(
    found: Program, feeds: dict[str, np.ndarray[Any, Any]]
) -> dict[str, np.ndarray[Any, Any]]:
    want = Interpreter(found).run({name: torch.tensor(array) for name, array in feeds.items()})
    return {name: value.numpy() for name, value in want.items()}


def take_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of one token goes by integers, in blocks of 8 slots."""
    monkeypatch.setattr(integer_attention, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(one_token, "_USED_THIRDS", 0)
    monkeypatch.setattr(integer_attention, "BLOCK", 8)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    take_integers(monkeypatch)


def most_wrong(found: Program, feeds: dict[str, np.ndarray[Any, Any]], scale: float) -> float:
    """The largest error that two planes can make, of queries and of probabilities.

    A number of a query is off by half a step, 1 / (63 * 126) of the row's largest, and so a score by that
    times the sum of a key's codes; a probability by half of 1 / 127 ** 2 of its block's largest.
    """
    key_scale, value_scale = (found.weights[name].load().numpy() for name in ("ks", "vs"))
    groups = feeds["q"].reshape(*feeds["q"].shape[:2], len(key_scale), -1, key_scale.shape[1])
    largest = (abs(groups) * key_scale[:, None] * scale).max()
    score = largest / (2 * 63 * 126) * abs(feeds["cache.0.0.key"].astype(int)).sum(-1).max()
    block = integer_attention.BLOCK / (2 * 127**2)
    share = float(np.expm1(2 * score) + block)
    return 2 * share * 128 * float(value_scale.max())


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("heads", "kv", "size", "options"),
    [
        (6, 1, 16, {}),
        (14, 2, 64, {"half": 32}),
        (12, 2, 32, {"half": 16, "pairing": "true"}),
        (8, 1, 32, {"half": 8}),
        (14, 2, 24, {"half": 12}),
        (16, 1, 8, {}),
    ],
)
@pytest.mark.parametrize(("slots", "lengths"), [(16, [0]), (40, [39]), (704, [699, 3, 250])])
def test_it_gives_what_the_operator_means(
    heads: int,
    kv: int,
    size: int,
    options: dict[str, Any],
    slots: int,
    lengths: list[int],
    tmp_path: Path,
) -> None:
    """Groups of several sizes, every kind of rotary embedding, rows of unequal length; slots behind the used
    ones hold anything."""
    found = layer(heads, kv, size, **options)
    feeds = inputs(found, slots, lengths)
    got, want = run(session(found, tmp_path), feeds), reference(found, feeds)
    error = abs(got["o"] - want["o"])
    assert error.max() <= most_wrong(found, feeds, size**-0.5)
    # What is rounded up makes up for what is rounded down.
    assert np.sqrt((error**2).mean()) <= 2e-3 * np.sqrt((want["o"] ** 2).mean())
    for row, length in enumerate(lengths):
        for name in ("cache.0.0.key", "cache.0.0.value"):
            # A number that lies on the edge of two codes may fall on either side.
            far = got[name][row].astype(int) - want[name][row]
            assert abs(far[:, : length + 1]).max() <= 1
            assert not far[:, :length].any()


@pytest.mark.parametrize("half", [0, 16])
def test_a_new_token_is_rounded_as_group_query_attention_rounds_it(
    half: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Prompts are read by one and tokens decoded by the other, from the same bytes."""
    found = layer(12, 2, 32, half=half)
    wide = session(found, tmp_path)
    take_integers(monkeypatch)
    narrow = session(found, tmp_path)
    lengths = list(range(5, 24)) * 20
    feeds = inputs(found, 24, lengths)
    feeds["k"] *= 2.0  # some are cut off at the largest code
    one, other = run(wide, feeds), run(narrow, feeds)
    assert (one["o"] != other["o"]).any()  # two ways indeed
    assert abs(one["o"] - other["o"]).max() <= most_wrong(found, feeds, 32**-0.5)
    for name in ("cache.0.0.key", "cache.0.0.value"):
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(
                one[name][row, :, : length + 1], other[name][row, :, : length + 1]
            )


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("block", [64, 512])
@pytest.mark.parametrize(("top", "background"), [(0.1, 5.5e-5), (0.9, 6e-6)])
def test_small_probabilities_beside_a_large_one_count(
    top: float, background: float, block: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One token of a probability of 0.1 and 16 thousand of 5e-5, which make nine tenths of the result: those
    that share a block with the one may be lost, no others."""
    monkeypatch.setattr(integer_attention, "BLOCK", block)
    slots = 16384
    found = layer(6, 1, 16, scale=1.0, key_scale=torch.full((1, 16), 0.01))
    feeds = inputs(found, slots, [slots - 1])
    keys, values = feeds["cache.0.0.key"], feeds["cache.0.0.value"]
    keys[:] = values[:] = 0
    feeds["k"][:] = feeds["v"][:] = feeds["q"][:] = 0
    keys[0, 0, 77, 0] = 100
    feeds["q"][..., 0] = np.log(top / background)
    values[..., 0] = 100
    values[0, 0, 77] = np.arange(16)
    got, want = run(session(found, tmp_path), feeds)["o"], reference(found, feeds)["o"]
    assert want[0, 0, 0, 0] > 0.08
    # A half step of the second plane, all alike, in one block; and half a step of the query, 12 / 63 / 126.
    lost = block / slots + np.expm1(np.log(top / background) / (2 * 63 * 126))
    np.testing.assert_allclose(got, want, rtol=lost, atol=1e-6)


@pytest.mark.usefixtures("always")
def test_a_query_of_zeros_takes_the_mean(tmp_path: Path) -> None:
    found = layer(6, 1, 16)
    feeds = inputs(found, 48, [44])
    feeds["q"][:] = 0
    got, want = run(session(found, tmp_path), feeds)["o"], reference(found, feeds)["o"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("always")
def test_the_largest_numbers_do_not_overflow(tmp_path: Path) -> None:
    """Codes of 127 and -128 against queries of one size: the largest sums of products there are."""
    found = layer(6, 1, 128, scale=0.01)
    feeds = inputs(found, 3000, [2999])
    feeds["q"][:] = np.sign(feeds["q"])
    for name in ("cache.0.0.key", "cache.0.0.value"):
        feeds[name][:] = np.where(feeds[name] < 0, -128, 127)
    got, want = run(session(found, tmp_path), feeds)["o"], reference(found, feeds)["o"]
    assert abs(got - want).max() <= most_wrong(found, feeds, 0.01)


@pytest.mark.parametrize(
    ("slots", "lengths", "taken"),
    [
        (5120, [4300], True),
        (5120, [9, 4300], True),
        (5120, [4000], False),  # too few tokens
        (7680, [4300], False),  # too many slots for them
        (5000, [4300], False),  # no whole blocks
    ],
)
def test_it_is_taken_where_it_is_faster(
    slots: int, lengths: list[int], taken: bool, tmp_path: Path
) -> None:
    found = session(layer(6, 1, 8), tmp_path, profile=True)
    run(found, inputs(layer(6, 1, 8), slots, lengths))
    events = json.loads(Path(found.end_profiling()).read_text())
    ran = {event.get("args", {}).get("op_name") for event in events}
    assert ("MatMulIntegerToFloat" in ran) == taken
    assert ("GroupQueryAttention" in ran) == (not taken)


def test_several_new_tokens_go_by_group_query_attention(tmp_path: Path) -> None:
    found = layer(6, 1, 16, half=8)
    feeds = inputs(found, 5120, [4300], new=5)
    got, want = run(session(found, tmp_path), feeds), reference(found, feeds)
    np.testing.assert_allclose(got["o"], want["o"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv", "size", "options"),
    [(6, 1, 16, {"half": 8}), (14, 2, 64, {}), (10, 5, 32, {"half": 8, "pairing": "true"})],
)
def test_many_new_tokens_widen_what_is_in_use(
    heads: int, kv: int, size: int, options: dict[str, Any], tmp_path: Path
) -> None:
    """Once, some heads after the others; the slots behind, which hold noise, count for nothing."""
    found = layer(heads, kv, size, **options)
    made = session(found, tmp_path, profile=True)
    shapes = [(128, [70]), (128, [0]), (128, [96]), (64, [0, 0])]
    for slots, lengths in shapes:
        feeds = inputs(found, slots, lengths, new=WIDENED_FROM)
        want, got = reference(found, feeds), run(made, feeds)
        np.testing.assert_allclose(got["o"], want["o"], rtol=0, atol=1e-5)
        used = lengths[0] + WIDENED_FROM
        for name in ("cache.0.0.key", "cache.0.0.value"):
            apart = got[name][:, :, :used].astype(int) - want[name][:, :, :used]
            assert abs(apart).max() <= 1  # by which side of an edge a number falls on
            assert (apart != 0).mean() < 1e-3
    events = json.loads(Path(made.end_profiling()).read_text())
    attended = [
        event
        for event in events
        if event["name"].startswith("GroupQueryAttention") and "kernel_time" in event["name"]
    ]
    assert len(attended) == len(shapes) * min(4, kv)


@pytest.mark.parametrize(("heads", "kv", "products"), [(6, 2, 0), (8, 2, 2)])
def test_small_groups_decode_by_the_operator(
    heads: int, kv: int, products: int, tmp_path: Path
) -> None:
    session(layer(heads, kv, 16), tmp_path)
    model = ir.load(tmp_path / "m.onnx")
    found = [node.op_type for node in model.graph.all_nodes()]
    assert found.count("MatMulIntegerToFloat") == products


def test_its_memory_is_accounted_for() -> None:
    def peak(found: Program, dims: dict[str, int]) -> int:
        return peak_activation_bytes(found, dims, Onnx().scratch)

    dims = {"B": 2, "S": 1, "C": 5000}
    # Of two KV heads the keys and products with 16 columns, which both planes of 6 query heads are made.
    more = 2 * 5000 * 2 * (16 + 4 * 16) * 9 // 8
    out = 2 * 12 * 16 * 4
    assert peak(layer(12, 2, 16), dims) == out + more
    assert peak(layer(12, 2, 16), dims | {"S": 3}) == 3 * out
    assert peak(layer(6, 2, 16), dims) == 2 * 6 * 16 * 4
    # Of five KV heads two at a time, keys and values, sliced and in float32, and a quarter.
    wide = 2 * (2 * 2 * 16 * 5000 * 5 * 5 // 4 + 12 * 100 * 10 * 16)
    assert peak(layer(10, 5, 16), dims | {"S": 100}) == 2 * 10 * 16 * 4 * 100 + wide


@pytest.mark.parametrize(("name", "changes"), [("llama", {}), rarely("qwen3", {"head_dim": 32})])
def test_a_model_decodes_the_same_tokens(
    name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Prompts read by GroupQueryAttention, tokens decoded in integers; two rows of unequal length."""
    folder = models.save(
        name, tmp_path / "model", num_attention_heads=8, num_key_value_heads=1, **changes
    )
    prompts = [np.random.default_rng(0).integers(3, models.VOCABULARY, n).tolist() for n in (40, 9)]

    def tokens(kind: str, slots: int) -> list[list[int]]:
        einfold.compile(folder, tmp_path / kind, cache="int8", weights="fp32")
        loaded = einfold.load(tmp_path / kind, chunk=16, threads=1)
        rows = loaded.generate_batch(prompts, max_new_tokens=24, ignore_eos=True)
        assert loaded.engine.cache is not None
        assert loaded.engine.cache.capacity == slots
        return [row.tokens for row in rows]

    before = tokens("before", 63)
    take_integers(monkeypatch)
    assert tokens("after", 64) == before  # whole blocks, or no step would go by integers
    files = [(tmp_path / kind / "model.onnx").read_bytes() for kind in ("before", "after")]
    assert files[0] != files[1]


@pytest.mark.slow
def test_the_engine_takes_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where steps are faster so, and only there; the bytes are those of the capacity."""
    monkeypatch.setattr(integer_attention, "FEWEST_TOKENS", 40)
    monkeypatch.setattr(integer_attention, "BLOCK", 16)

    def engine(name: str, heads: int, context: int, cache: str, **options: Any) -> Any:
        folder = tmp_path / f"model{heads}"
        if not folder.exists():
            models.save("llama", folder, num_attention_heads=heads, num_key_value_heads=2)
        out = tmp_path / name
        einfold.compile(folder, out, cache=cache, context=context, check=False, **options)
        return einfold.load(out, threads=1).engine

    found = engine("whole", 8, 120, "int8")
    for asked, given in ((39, 39), (40, 48), (48, 48), (112, 112), (113, 113), (120, 120)):
        cache = found.allocate(2, asked, asked)
        assert cache.capacity == given
        assert cache.nbytes == found.layout.bytes(2, given, asked)
    assert engine("f32", 8, 120, "f32").allocate(1, 41).capacity == 41
    assert (
        engine("small", 4, 120, "int8").allocate(1, 41).capacity == 41
    )  # two query heads a KV head
    reference = engine("reference", 8, 120, "int8", target="reference")
    assert reference.allocate(1, 41).capacity == 41
    window = {"method": "streaming_llm", "recent": 60, "sinks": 4, "slack": 8}
    assert engine("window", 8, 120, "int8", prune=window).allocate(1, 90).capacity == 90


@pytest.mark.parametrize(
    ("said", "blocks"),
    [
        ("16 40", (16, 40)),
        ("0 7", (1, 7)),
        ("", (1, 0)),
        ("16", (1, 0)),
        ("-8 x", (1, 0)),
        ("9" * 99, (1, 0)),
    ],
)
def test_what_a_model_says_of_blocks_may_be_nonsense(said: str, blocks: tuple[int, int]) -> None:
    assert two_numbers(said) == blocks
