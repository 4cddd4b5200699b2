"""Methods that keep fewer tokens: what they make of the layout, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import einfold
from einfold.compiler.calibrate.statistics import Statistics
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.verifier import verify
from einfold.compiler.passes.cache.attach_cache import AttachCache
from einfold.compiler.passes.cache.plan_cache import PlanCache
from einfold.compiler.passes.kv_prune.native_window import NativeWindow
from einfold.compiler.passes.kv_prune.razor_attention import RazorAttention, choose
from einfold.compiler.recipe import Recipe
from einfold.errors import RecipeError

from .. import models
from ..greedy import all_logits, check_tokens, greedy_batch
from ..programs import program

BODY = """
    input %ids "input_ids" : i64[B, S]
    input %pos "position_ids" : i64[B, S]
    input %q "q" : f32[B, S, 8, 8]
    input %k "k" : f32[B, S, 4, 8]
    call %o = einfold.attention(%q, %k, %k, none, 0, 0.25, 0, 0.0) : f32[B, S, 8, 8]
    call %p = einfold.attention(%o, %k, %k, none, 1, 0.25, {window}, 0.0) : f32[B, S, 8, 8]
    output "o" = %p
"""


def planned(window: int = 0) -> Program:
    """Two layers of four KV heads each, the second with a window of its own where one is given."""
    found = program(BODY.format(window=window))
    PlanCache().run(found)
    return found


def lines(found: Program) -> list[str]:
    assert found.layout is not None
    return [
        line.replace(" key=8 value=8 ", " ").replace(" of=4 ", " ") for line in found.layout.lines()
    ]


class Known(Statistics):
    """Statistics with given scores in place of measured ones."""

    def __init__(self, **scores: list[list[float]]) -> None:
        self.scores = scores

    def retrieval_heads(self, program: Program, probe: int) -> dict[int, dict[str, torch.Tensor]]:
        return {
            layer: {name: torch.tensor(by[layer]) for name, by in self.scores.items()}
            for layer in (0, 1)
        }


def test_retrieval_heads_keep_all_and_the_others_a_window() -> None:
    found = planned()
    # Two query heads a KV head: the larger score counts.
    found.statistics = Known(
        induction=[[0, 0, 0.1, 0.9, 0, 0, 0.2, 0], [0] * 8],
        echo=[[0, 0, 0.9, 0.9, 0.5, 0, 0, 0], [0] * 8],
    )
    result = RazorAttention(induction=0.2, echo=0.1, sinks=2, recent=8, slack=4).run(found)
    window = "policy=window(sinks=2,recent=8,slack=4,compensation=1,prefill=exact) storage=f32"
    assert lines(found) == [
        "cache 0.0 heads=1,2,3 policy=full storage=f32",
        f"cache 0.1 heads=0 {window}",
        f"cache 1.0 heads=0,1,2,3 {window}",
    ]
    assert [note.what for note in result.notes] == [
        "3 of 4 KV heads retrieve and keep all; 1 keep 2 sinks, 8 recent tokens and a compensation token",
        "0 of 4 KV heads retrieve and keep all; 4 keep 2 sinks, 8 recent tokens and a compensation token",
    ]
    AttachCache().run(found)
    verify(found, deep=True)


def test_the_best_heads_are_chosen_once() -> None:
    induction = {(0, 0): 0.5, (0, 1): 0.9, (1, 0): 0.1}
    echo = {(0, 0): 0.2, (0, 1): 0.9, (1, 0): 0.3}
    assert choose(induction, echo, 1, 1) == {(0, 1), (1, 0)}
    assert choose(induction, echo, 0, 0) == set()


def test_without_weights_the_bytes_are_the_same() -> None:
    blind, seeing = planned(), planned()
    seeing.statistics = Known(induction=[[0] * 8, [1] * 8], echo=[[1] * 8, [0] * 8])
    for found in (blind, seeing):
        RazorAttention(induction=0.5, echo=0.125, recent=8).run(found)
    assert blind.layout is not None and seeing.layout is not None
    assert lines(blind) != lines(seeing)
    assert blind.layout.account() == seeing.layout.account()
    notes = RazorAttention(recent=8).run(planned()).notes
    assert [note.what for note in notes if note.action == "skipped"] == [
        "without weights they are chosen at will; only sizes count"
    ]


def test_what_cannot_be_pruned_is_refused_or_skipped() -> None:
    with pytest.raises(RecipeError, match=r"shares of retrieval heads, 0\.9 by induction and 0\.2"):
        RazorAttention(induction=0.9, echo=0.2)
    with pytest.raises(RecipeError, match="would keep 65 tokens, but the context has 64"):
        RazorAttention(recent=60).run(planned())
    found = planned(window=5)
    notes = RazorAttention(recent=8).run(found).notes
    assert ("layer 1", "has a sliding window of 5 tokens of its own") in [
        (note.where, note.what) for note in notes if note.action == "skipped"
    ]


def test_a_window_of_the_models_own_is_freed() -> None:
    found = planned(window=5)
    result = NativeWindow(slack=4).run(found)
    assert lines(found) == [
        "cache 0.0 heads=0,1,2,3 policy=full storage=f32",
        "cache 1.0 heads=0,1,2,3 policy=window(sinks=0,recent=5,slack=4,compensation=0,"
        "prefill=streaming) storage=f32",
    ]
    assert [note.what for note in result.notes] == ["keeps its window of 5 tokens and a slack of 4"]
    AttachCache().run(found)
    verify(found, deep=True)


def test_a_window_as_long_as_the_context_stays() -> None:
    found = planned(window=40)
    (note,) = NativeWindow(slack=30).run(found).notes
    assert note.action == "skipped" and "no less than the context of 64" in note.what
    (note,) = NativeWindow(slack=0).run(found).notes
    assert note.what == "switched off"


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("engine", ["onnx", "reference"])
def test_freed_windows_write_the_same_tokens(
    name: str,
    engine: str,
    model_folder: Callable[[str], Path],
    artifact: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Past the window and past several moves, alone and in rows of unequal lengths."""
    recipe = Recipe.build({"cache": {"window_slack": 8}})
    einfold.compile(model_folder(name), tmp_path / "out", recipe=recipe)
    original, random = models.build(name), np.random.default_rng(3)
    prompts = [random.integers(3, models.VOCABULARY, length).tolist() for length in (5, 61, 30)]
    new = 40
    expected = greedy_batch(original, prompts, new)
    freed = einfold.load(tmp_path / "out", engine=engine, chunk=16, threads=1)  # type: ignore[arg-type]
    found = freed.generate_batch(prompts, max_new_tokens=new, ignore_eos=True)
    for prompt, want, got in zip(prompts, expected, found, strict=True):
        check_tokens(original, prompt, want, got.tokens)
    text = prompts[1] + expected[1]
    full = einfold.load(artifact(name), threads=1)
    assert np.abs(all_logits(freed, text) - all_logits(full, text)).max() < 1e-4
    layout = freed.artifact.manifest.layout()
    assert freed.engine.cache is not None
    assert freed.engine.cache.nbytes == layout.bytes(1, len(text))
    windows = sum(group.moves for _, _, group in layout.groups())
    assert windows == {"mistral": 2, "gemma2": 1, "gemma3": 1, "gpt_oss": 1}[name]
