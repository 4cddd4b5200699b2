"""Attention over packed tokens of 4 bits in onnxruntime, beside the operator's reference meaning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import einfold
from einfold.compiler.analysis.liveness import peak_activation_bytes
from einfold.compiler.codegen.onnx import packed_attention
from einfold.compiler.codegen.onnx.process import PAIRS
from einfold.compiler.codegen.onnx.target import Onnx
from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.kv.codes.codec import Seen, encode
from einfold.compiler.ir.kv.store.abq.storage import Abq
from einfold.compiler.ir.kv.store.packed import Packed
from einfold.compiler.ir.kv.store.storage import GroupShape
from einfold.compiler.ir.kv.store.turboquant.storage import TurboQuant
from einfold.compiler.ir.ops import einfold_ops
from einfold.compiler.ir.ops.packed import packed_storage
from einfold.compiler.ir.program import Program, call_arguments
from einfold.compiler.recipe import Recipe
from einfold.errors import RecipeError, UnsupportedError
from einfold.model import Model
from einfold.runtime.cache import Cache

from ... import models
from ...programs import program
from ...quick import quick, rarely
from .test_onnx import build

PACKED = """
    {sink_weight}
    input %ids "input_ids" : i64[B, S]
    input %q "q" : f32[B, S, {heads}, {size}]
    input %k "k" : f32[B, S, {kv}, {size}]
    input %v "v" : f32[B, S, {kv}, {value}]
    input %kc "cache.0.0.key" : f32[B, {kv}, C0, {size}]
    input %vc "cache.0.0.value" : f32[B, {kv}, C0, {value}]
    input %used "slots.0" : i64[B]
    input %packed "packed.0" : i64[B]
    {pieces}
    {sink_read}
    call %a = einfold.packed_attention(%q, %k, %v, %kc, %vc, %used, %packed, [{bulk}], \
{sinks}, none, none, none, 0, 0.25, {softcap}, false, "{storage}") : \
(f32[B, S, {heads}, {value}], f32[B, {kv}, C0, {size}], f32[B, {kv}, C0, {value}])
    call %o = builtin.getitem(%a, 0) : f32[B, S, {heads}, {value}]
    call %k2 = builtin.getitem(%a, 1) : f32[B, {kv}, C0, {size}]
    call %v2 = builtin.getitem(%a, 2) : f32[B, {kv}, C0, {value}]
    output "o" = %o
    output "cache.0.0.key" = %k2
    output "cache.0.0.value" = %v2
"""


#: Packed tokens that are multiplied as integers, of so many a granule in heads of so many numbers.
FORMS: dict[str, Callable[[int, int], Packed]] = {
    "turboquant": lambda granule, size: TurboQuant(group=granule),
    "abq": lambda granule, size: Abq(tokens=granule, block=size // 2),
    "abq, four blocks": lambda granule, size: Abq(tokens=granule, block=size // 4),
}


def layer(
    heads: int,
    kv: int,
    size: int,
    granule: int = 8,
    *,
    softcap: float = 0.0,
    sinks: bool = False,
    value: int = 0,
    form: str = "turboquant",
) -> Program:
    """One attention over tokens that are packed by granules, and over slots."""
    storage = FORMS[form](granule, size)
    pieces = list(storage.pieces(GroupShape(kv, size, value or size)))
    text = PACKED.format(
        heads=heads,
        kv=kv,
        size=size,
        value=value or size,
        pieces="\n    ".join(
            f'input %{p.name} "{p.name}" : {p.dtype}[B, {kv}, G0, {p.rows}, {p.width}]'
            for p in pieces
        ),
        bulk=", ".join(f"%{piece.name}" for piece in pieces),
        softcap=softcap,
        sink_weight=f"weight @snk : f32[{heads}]" if sinks else "",
        sink_read=f'read %snk "snk" : f32[{heads}]' if sinks else "",
        sinks="%snk" if sinks else "none",
        storage=storage.text,
    )
    return program(text)


def inputs(
    found: Program, granules: int, packed: list[int], used: list[int], new: int, factor: float = 3.0
) -> dict[str, torch.Tensor]:
    """Rows with so many packed granules and used slots; what a row has not packed is another's."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    query, key = (found.placeholder(name).meta["val"].shape for name in ("q", "k"))
    (heads, size), kv, batch = query[2:], int(key[2]), len(packed)
    (call,) = found.nodes(einfold_ops.packed_attention.default)
    storage = packed_storage(call_arguments(call)["storage"])
    granule = storage.granule
    tokens = granules * granule
    rows = [
        encode(
            storage,
            normal(kv, tokens, size) + normal(kv, 1, size),
            normal(kv, tokens, size),
            Seen(),
        )
        for _ in packed
    ]
    bulk = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return bulk | {
        "input_ids": torch.zeros(batch, new, dtype=torch.int64),
        "q": factor * normal(batch, new, heads, size),
        "k": normal(batch, new, kv, size),
        "v": normal(batch, new, kv, size),
        "cache.0.0.key": normal(batch, kv, 40, size),
        "cache.0.0.value": normal(batch, kv, 40, size),
        "slots.0": torch.tensor(used),
        "packed.0": torch.tensor(packed) * granule,
    }


def both(
    found: Program, folder: Path, given: dict[str, torch.Tensor]
) -> list[list[np.ndarray[Any, Any]]]:
    """(what onnxruntime gives, what the reference does)."""
    want = Interpreter(found).run({name: value.clone() for name, value in given.items()})
    session, names = build(found, "ort", folder)
    asked = {node.name for node in session.get_inputs()}
    got = session.run(None, {n: value.numpy() for n, value in given.items() if n in asked})
    return [list(got), [want[name].numpy() for name in names]]


#: Query heads, KV heads, their size and the granule; granules that there is room for, packed and used a row.
CASES = [
    (4, 2, 16, 8, 10, [5, 0, 10], [4, 0, 7]),
    (14, 2, 64, 64, 6, [6, 3], [39, 9]),
    (3, 3, 8, 16, 26, [26], [1]),  # blocks of 13 granules
    (8, 1, 32, 8, 134, [67], [30]),  # of 2
    (4, 4, 16, 600, 2, [2], [3]),  # of one, longer than others
    (2, 1, 24, 4, 8, [7], [0]),
]


@pytest.mark.parametrize(("softcap", "sinks"), quick([(0.0, False), (8.0, True)], (0.0, False)))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_token_attends_in_integers(
    case: Any, form: str, softcap: float, sinks: bool, tmp_path: Path
) -> None:
    heads, kv, size, granule, granules, packed, used = case
    found = layer(heads, kv, size, granule, softcap=softcap, sinks=sinks, form=form)
    got, want = both(found, tmp_path, inputs(found, granules, packed, used, 1))
    # Planes of queries hold 13 bits; codes themselves are off by a hundred times as much.
    np.testing.assert_allclose(got[0], want[0], atol=2e-3)
    assert np.abs(got[0] - want[0]).mean() < 2e-4
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("new", "softcap", "sinks"),
    quick([(2, 0.0, False), (9, 0.0, False), (3, 8.0, True)], (3, 8.0, True)),
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_several_tokens_attend_in_float32(
    case: Any, form: str, new: int, softcap: float, sinks: bool, tmp_path: Path
) -> None:
    heads, kv, size, granule, granules, packed, used = case
    found = layer(heads, kv, size, granule, softcap=softcap, sinks=sinks, form=form)
    used = [min(slots, 40 - new) for slots in used]
    got, want = both(found, tmp_path, inputs(found, granules, packed, used, new))
    np.testing.assert_allclose(got[0], want[0], atol=2e-5)
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_blocks_hold_as_many_granules_as_divide_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Numbers do not depend on it, but for what small weights lose beside large ones."""
    found = layer(4, 2, 16, 8)
    given = inputs(found, 64, [61], [7], 1, factor=1.0)
    whole = both(found, tmp_path, given)
    monkeypatch.setattr(packed_attention, "BLOCK", 16)
    small = both(found, tmp_path, given)
    assert not np.array_equal(whole[0][0], small[0][0])
    for got, want in (whole, small):
        np.testing.assert_allclose(got[0], want[0], atol=1e-3)


def test_a_large_weight_hides_no_small_ones(tmp_path: Path) -> None:
    """A slot has nine tenths of the softmax, and thousands of packed tokens share the rest."""
    found = layer(2, 1, 16, 8)
    given = inputs(found, 512, [512], [5], 1, factor=0.3)
    given["cache.0.0.key"][0, 0, 2] = (
        14 * given["q"][0, 0, 0] / given["q"][0, 0, 0].square().sum() / 0.25
    )
    got, want = both(found, tmp_path, given)
    np.testing.assert_allclose(got[0], want[0], atol=1e-4)


def test_what_is_not_looked_at_has_no_say_in_how_fine_weights_are(tmp_path: Path) -> None:
    """Values of one granule are the largest that there are, and no query sees its keys."""
    found = layer(4, 2, 16, 8)
    given = inputs(found, 10, [10], [8], 1, factor=1.0)
    given["value_scale"][:, :, 3] = 65504
    given["key_mean"][:, :, 3] = 0
    given["key_scale"][:, :, 3] = 0
    seen = given["q"].reshape(1, 2, 2, 16).sum(2)
    others = [n for n in range(10) if n != 3]
    given["key_mean"][:, :, others, 0] += (400 * seen / seen.square().sum(-1, keepdim=True))[
        :, :, None
    ].half()
    given["cache.0.0.key"][:] += 400 * (seen / seen.square().sum(-1, keepdim=True))[:, :, None]
    got, want = both(found, tmp_path, given)
    assert np.abs(want[0]).max() < 10  # of others alone
    np.testing.assert_allclose(got[0], want[0], atol=2e-3)


def test_a_query_of_zeros_takes_the_mean(tmp_path: Path) -> None:
    found = layer(4, 2, 16, 8)
    got, want = both(found, tmp_path, inputs(found, 10, [10], [8], 1, factor=0.0))
    np.testing.assert_allclose(got[0], want[0], atol=1e-4)


def test_heads_of_two_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="one head size for keys and values, here 16 and 8"):
        build(layer(4, 2, 16, value=8), "ort", tmp_path)


def test_its_memory_is_accounted_for() -> None:
    """A token's queries and results, and what one layer makes of so many packed tokens."""
    found, dims = layer(12, 2, 16), {"B": 2, "S": 1, "C0": 40, "G0": 1000}
    out = 2 * 12 * 16 * 4
    copy = 2 * (16 + 2 + 2 + 2 * 16 // 8)  # codes, scales, the mean of 8 keys
    each = copy + max(3 * 32 // 2, 32 + 12 * 12, 16 + 18 * 12) * 9 // 8
    assert peak_activation_bytes(found, dims, Onnx().scratch) == out + 2 * 8000 * each
    over = PAIRS // 8000
    assert over == 32 < TurboQuant().slack
    several = 2 * 8000 * (copy + 14 * 32 + 12 * 12 * over)
    assert peak_activation_bytes(found, dims | {"S": 50}, Onnx().scratch) == 50 * out + several
    capped = layer(12, 2, 16, softcap=8.0)
    nothing = {"B": 1, "S": 50, "C0": 4000, "G0": 0}
    logits = 4 * 50 * 12 * 4000
    assert peak_activation_bytes(capped, nothing, Onnx().scratch) == 25 * out + logits


STORED: dict[str, Any] = {"method": "turboquant", "group": 8, "residual": 8, "slack": 8}
ABQ: dict[str, Any] = {"method": "abq", "block": 8, "tokens": 8, "residual": 8, "slack": 8}


def compiled(folder: Path, out: Path, target: str, **cache: Any) -> Model:
    table = {"target": target, "cache": {"quant": STORED, **cache}}
    einfold.compile(folder, out / target, recipe=table)
    return einfold.load(out / target, chunk=16, threads=1)


@pytest.mark.parametrize(
    ("architecture", "cache"),
    [
        ("llama", {}),
        rarely("qwen2", {"quant": STORED | {"prefill": "streaming"}}),
        ("llama", {"quant": ABQ}),
        rarely("qwen2", {"quant": ABQ | {"prefill": "streaming", "order": "both"}}),
        rarely("gemma2", {}),
        rarely("gpt2", {"quant": STORED | {"sinks": 0}}),
        rarely("llama", {"share": {"method": "cross_layer", "layers": 1}}),
        rarely(
            "llama",
            {"prune": {"method": "razor_attention", "induction": 0.5, "recent": 12, "slack": 4}},
        ),
    ],
    ids=str,
)
def test_a_model_says_what_the_reference_says(
    architecture: str, cache: dict[str, Any], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Steps of one token and of several, over granule behind granule; and the same bytes."""
    pair = [
        compiled(model_folder(architecture), tmp_path, target, **cache)
        for target in ("onnx", "reference")
    ]
    tokens = np.random.default_rng(0).integers(3, models.VOCABULARY, 120)
    found = [_read(model, tokens) for model in pair]
    (got, mine), (want, theirs) = found
    assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()
    assert mine.packed.keys() and min(int(n[0]) for n in mine.packed.values()) >= 88
    assert mine.buffers.keys() == theirs.buffers.keys()
    for name, buffer in mine.buffers.items():
        if buffer.dtype == np.uint8:
            assert (buffer != theirs.buffers[name]).mean() < 0.01, name
    assert mine.nbytes == pair[0].engine.layout.bytes(1, 120)


def _read(model: Model, tokens: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], Cache]:
    """Logits behind a prompt, of single tokens and of chunks; and the cache."""
    engine = model.engine
    cache = engine.allocate(1, len(tokens), 40)
    found = [engine.prefill(cache, [tokens[:40]])]
    for place in range(40, 80):
        cache.make_room(1)
        step = np.array([[place]])
        found.append(engine.step(cache, tokens[step], step, np.arange(1)).copy())
        cache.advance(1)
    found += [logits.copy() for _, logits in engine.stream(cache, tokens, True, 80)]
    return np.concatenate(found), cache


def test_rows_go_by_their_own_lengths(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = compiled(model_folder("llama"), tmp_path, "onnx")
    prompts = [list(range(3, 3 + n)) for n in (50, 9, 30)]
    rows = model.generate_batch(prompts, max_new_tokens=30, ignore_eos=True)
    for row, prompt in zip(rows, prompts, strict=True):
        alone = model.generate(prompt, max_new_tokens=30, ignore_eos=True)
        assert row.tokens == alone.tokens
    cache = model.engine.cache
    assert cache is not None and cache.nbytes == model.engine.layout.bytes(1, cache.capacity)


def test_a_step_over_packed_tokens_is_as_long_as_there_is_memory_for(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compiled(model_folder("llama"), tmp_path, "onnx")
    engine, sizes = model.engine, list[int]()
    step = engine.step
    monkeypatch.setattr(
        engine,
        "step",
        lambda cache, ids, *rest: (sizes.append(ids.shape[1]), step(cache, ids, *rest))[1],
    )
    tokens = np.random.default_rng(1).integers(3, models.VOCABULARY, 100)
    monkeypatch.setattr("einfold.runtime.engine._FEWEST_TOGETHER", 3)
    for pairs, wanted in ((PAIRS, {8, 6}), (150, {6, 5, 4, 3, 1}), (1, {1})):
        monkeypatch.setattr(engine.runner, "most_pairs", pairs)
        cache = engine.allocate(1, 100, 40)
        assert cache.most_packed() == 0
        engine.prefill(cache, [tokens[:40]])
        assert cache.most_packed() == 24  # not what there is room for, which is 96
        sizes.clear()
        list(engine.stream(cache, tokens[:70], False, 40))
        # By what is packed meanwhile, and one by one where fewer than three would go together.
        assert set(sizes) <= wanted and max(sizes) == max(wanted) and sum(sizes) == 30


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"quant": "turboquant:bits=3"}, "take bits=4 and levels=even, which are the defaults"),
        ({"quant": "turboquant:levels=normal"}, "take bits=4 and levels=even"),
        ({"quant": "abq:bits=6"}, "take bits=4, the default, and an even block"),
        ({"quant": "abq:block=1"}, "take bits=4, the default, and an even block"),
        ({"quant": "turboquant:value_bits=2"}, "take bits=4 and levels=even"),
        (
            {"quant": "kivi:bits=4"},
            "take cache.quant turboquant, whose codes it multiplies as integers",
        ),
        ({"quant": "gear"}, "take cache.quant turboquant"),
        ({"quant": "mustafar"}, "every step; compile for the target reference"),
        ({"share": "minicache"}, "take cache.quant turboquant"),
    ],
)
def test_other_codes_are_refused(table: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        Recipe.build({"target": "onnx", "cache": table})


def test_the_portable_flavour_refuses_it() -> None:
    data = {"target": "onnx", "cache": {"quant": "turboquant"}, "onnx": {"portable": True}}
    with pytest.raises(
        RecipeError, match="the portable flavour has no operator that multiplies codes"
    ):
        Recipe.build(data)
