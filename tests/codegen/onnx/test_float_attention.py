"""Decode steps over a float32 cache in two products of matrices, beside the operator's reference meaning."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import einfold
from einfold.compiler.analysis.liveness import peak_activation_bytes
from einfold.compiler.codegen.onnx import account, float_attention, one_token
from einfold.compiler.codegen.onnx.target import Onnx
from einfold.compiler.ir.program import Program

from ... import models
from ...quick import rarely
from . import test_integer_attention
from .test_integer_attention import inputs, reference, run, session

PAGED = {"method": "quest", "page": 4, "share": 0.25, "tokens": 12, "skip_layers": 0}

layer = partial(test_integer_attention.layer, kind="f32")


def take_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of one token goes by products."""
    monkeypatch.setattr(float_attention, "fewest_tokens", lambda group: 1)
    monkeypatch.setattr(one_token, "_USED_THIRDS", 0)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    take_products(monkeypatch)


def operators(made: Any) -> set[str]:
    """What a profiled session ran."""
    events = json.loads(Path(made.end_profiling()).read_text())
    return {event.get("args", {}).get("op_name") for event in events}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("heads", "kv", "size", "options"),
    [
        (6, 1, 16, {}),
        (14, 2, 64, {"half": 32}),
        (12, 2, 32, {"half": 16, "pairing": "true"}),
        (4, 2, 24, {"half": 12}),
        (9, 3, 64, {"half": 32, "window": 20}),
        (6, 2, 16, {"softcap": 2.0}),
        (6, 2, 16, {"sinks": True}),
        (8, 2, 32, {"half": 16, "window": 7, "softcap": 3.0, "sinks": True}),
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
    """Groups of several sizes, every kind of rotary embedding, windows, caps, sinks, rows of unequal length;
    slots behind the used ones hold numbers, which count for nothing."""
    found = layer(heads, kv, size, **options)
    feeds = inputs(found, slots, lengths)
    made = session(found, tmp_path, profile=True)
    got, want = run(made, feeds), reference(found, feeds)
    assert "GroupQueryAttention" not in operators(made)
    np.testing.assert_allclose(got["o"], want["o"], rtol=0, atol=2e-6)
    for name in ("cache.0.0.key", "cache.0.0.value"):
        for row, length in enumerate(lengths):
            used = np.s_[row, :, : length + 1]
            np.testing.assert_allclose(got[name][used], want[name][used], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("heads", "slots", "lengths", "new", "taken"),
    [
        (6, 600, [520], 1, True),
        (6, 600, [9, 520], 1, True),
        (6, 600, [400], 1, False),  # too few tokens
        (6, 900, [520], 1, False),  # too many slots for them
        (6, 600, [520], 2, False),  # two new tokens
        (4, 600, [520], 1, False),  # too few tokens for two query heads a KV head
        (4, 2200, [2100], 1, True),
    ],
)
def test_it_is_taken_where_it_is_faster(
    heads: int, slots: int, lengths: list[int], new: int, taken: bool, tmp_path: Path
) -> None:
    found = layer(heads, 2, 16, half=8)
    made, feeds = session(found, tmp_path, profile=True), inputs(found, slots, lengths, new)
    got, want = run(made, feeds), reference(found, feeds)
    np.testing.assert_allclose(got["o"], want["o"], rtol=0, atol=1e-5)
    ran = operators(made)
    assert ("FusedMatMul" in ran) == taken
    assert ("GroupQueryAttention" in ran) == (not taken)


def test_a_head_of_its_own_keys_decodes_by_the_operator(tmp_path: Path) -> None:
    session(layer(4, 4, 16), tmp_path)
    kinds = {node.op_type for node in ir.load(tmp_path / "m.onnx").graph.all_nodes()}
    assert "GroupQueryAttention" in kinds
    assert "FusedMatMul" not in kinds


def test_its_memory_is_accounted_for() -> None:
    def peak(found: Program, dims: dict[str, int]) -> int:
        return peak_activation_bytes(found, dims, Onnx().scratch)

    dims, out = {"B": 2, "S": 1, "C": 5000}, 2 * 12 * 16 * 4
    for sinks in (False, True):
        assert peak(layer(12, 2, 16, sinks=sinks), dims) == out + 2 * 12 * 5000 * 4 * 2
    assert peak(layer(12, 2, 16), dims | {"S": 3}) == 3 * out
    assert peak(layer(12, 12, 16), dims) == out


@pytest.mark.parametrize(
    ("name", "changes", "share"),
    [
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2}, {}),
        ("llama", {"num_attention_heads": 8}, {"share": {"method": "cross_layer", "layers": 1}}),
        rarely("gemma2", {}, {}),
        # Slots of the first layers are whole pages, 64; those of others are what was asked for, 63.
        ("gemma4", {}, {"read": PAGED}),
        rarely("llama", {}, {"share": {"method": "cross_layer", "layers": 1}, "read": PAGED}),
        rarely("gpt_oss", {}, {}),
        rarely("qwen3", {}, {}),
    ],
)
def test_a_model_decodes_the_same_tokens(
    name: str,
    changes: dict[str, Any],
    share: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Prompts read by GroupQueryAttention, tokens decoded by products; two rows of unequal length, and layers
    that read another's slots."""
    folder = models.save(name, tmp_path / "model", **changes)
    prompts = [np.random.default_rng(0).integers(3, models.VOCABULARY, n).tolist() for n in (40, 9)]

    def tokens(kind: str) -> list[list[int]]:
        einfold.compile(folder, tmp_path / kind, weights="fp32", check=False, **share)
        loaded = einfold.load(tmp_path / kind, chunk=16, threads=1)
        rows = loaded.generate_batch(prompts, max_new_tokens=24, ignore_eos=True)
        return [row.tokens for row in rows]

    monkeypatch.setattr(account, "PRODUCTS_FROM", 99)
    before = tokens("before")
    monkeypatch.undo()
    take_products(monkeypatch)
    assert tokens("after") == before
    files = [(tmp_path / kind / "model.onnx").read_bytes() for kind in ("before", "after")]
    assert files[0] != files[1]
