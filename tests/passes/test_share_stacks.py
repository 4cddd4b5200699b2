"""Sharing, pruning and packing in one layout, on whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einfold

from .. import models
from ..greedy import all_logits
from ..quick import rarely

TOKENS = list(range(3, 93))
MINICACHE = {"method": "minicache", "group": 8, "residual": 8, "slack": 16}
KIVI = {"method": "kivi", "bits": 8, "group": 8, "residual": 8, "slack": 16}
RAZOR = {"method": "razor_attention", "recent": 30, "slack": 16, "prefill": "streaming"}
CROSS = {"method": "cross_layer", "layers": 1, "threshold": -1}


def compiled(folder: Path, target: str, **cache: Any) -> Path:
    model = models.save(
        "llama",
        folder / "model",
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    einfold.compile(model, folder / "out", recipe={"target": target, "cache": cache})
    return folder / "out"


@pytest.mark.slow
def test_pruned_packed_and_merged_layers_are_one_layout(tmp_path: Path) -> None:
    out = compiled(tmp_path, "reference", share=MINICACHE, prune=RAZOR, quant=KIVI)
    model = einfold.load(out, engine="reference", chunk=16)
    lines = list(model.artifact.manifest.layout().lines())
    kinds = {
        kind: sum(kind in line for line in lines) for kind in ("window(", "kivi(", "minicache(")
    }
    assert kinds["window("] == 2 and kinds["kivi("] >= 1 and kinds["minicache("] == 2
    got = model.generate(TOKENS, max_new_tokens=8, ignore_eos=True).tokens
    assert len(got) == 8
    cache = model.engine.cache
    layout = model.artifact.manifest.layout()
    assert cache is not None
    assert cache.nbytes == layout.bytes(1, cache.capacity)
    assert cache.nbytes < 4 * 4 * 16 * 4 * cache.capacity


@pytest.mark.slow
def test_a_reader_of_a_packed_layer_is_close_to_one_of_a_whole_layer(tmp_path: Path) -> None:
    quant = KIVI | {"prefill": "streaming", "rotate": "both"}  # the reader's heads are rotated too
    small = compiled(tmp_path / "small", "reference", share=CROSS, quant=quant)
    whole = compiled(tmp_path / "whole", "reference", share=CROSS)
    want, got = (
        all_logits(einfold.load(out, engine="reference", chunk=16), TOKENS)
        for out in (whole, small)
    )
    error = np.sqrt(np.square(got - want).mean() / np.square(want).mean())
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("portable", [False, rarely(True)])
def test_a_reader_of_a_pruned_layer_on_onnx(portable: bool, tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    model = models.save("llama", tmp_path / "model", num_hidden_layers=3, **sizes)
    recipe = {"cache": {"share": CROSS, "prune": RAZOR}, "onnx": {"portable": portable}}
    einfold.compile(model, tmp_path / "out", recipe=recipe)
    lines = list(einfold.load(tmp_path / "out").artifact.manifest.layout().lines())
    assert sum("compensation=1" in line for line in lines) >= 2
    assert sum("policy=full" in line for line in lines) == 2  # retrieval heads, and the reader
    assert sum("owner=" in line for line in lines) == 1
    want, got = (
        all_logits(einfold.load(tmp_path / "out", engine=engine, chunk=16), TOKENS)
        for engine in ("reference", "onnx")
    )
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4)
