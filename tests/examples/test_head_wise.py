"""Heads that a head-wise method keeps whole are those whose caches the trained model needs: the ablation of
benchmarks/head_ablation.py, on the shipped model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from einfold.compiler.calibrate.head_gates import PASSAGE, GatedReading
from einfold.compiler.driver import open_model, plan_cache
from einfold.compiler.recipe import Recipe
from einfold.runtime.tokenizer import Tokenizer

from ..quick import quick

MODEL = Path(__file__).parents[2] / "examples" / "tiny_llama"

#: A quarter of the heads each; what is read here is of none of the texts that they look at.
METHODS = (
    "razor_attention:induction=0.25,echo=0,recent=60",
    "duo_attention:full=0.25,recent=60,steps=8",
)


@pytest.mark.parametrize(
    "method", quick(METHODS, METHODS[1]), ids=["razor_attention", "duo_attention"]
)
def test_recall_needs_the_heads_that_are_kept_whole(method: str) -> None:
    recipe = Recipe.build({"cache": {"prune": method}})
    found = plan_cache(open_model(MODEL), recipe)
    assert found.layout is not None
    reading = GatedReading(found, {x.layer: x.kv_heads for x in found.layout.layers}, 4, 60)
    text = torch.tensor(Tokenizer(MODEL).encode((MODEL / "eval.txt").read_text()[:4000]))
    past = reading.read(text[:640])
    drawn = random.Random(1)
    starts = drawn.sample(range(8, 640 - 60 - PASSAGE, PASSAGE), 16)
    asked = torch.stack([text[at : at + PASSAGE] for at in starts])

    def lost(heads: list[int]) -> float:
        gates = torch.zeros(reading.heads)
        gates[heads] = 1
        with torch.no_grad():
            return float(reading.loss(past, asked, gates))

    kept = [
        reading.gates[layer.layer].start + head
        for layer, _, group in found.layout.groups()
        for head in group.heads
        if not group.moves
    ]
    everything, nothing, chosen = lost([*range(reading.heads)]), lost([]), lost(kept)
    others = [lost(drawn.sample(range(reading.heads), len(kept))) for _ in range(4)]
    assert chosen - everything < 0.5 * (nothing - everything)
    assert chosen < min(others)
