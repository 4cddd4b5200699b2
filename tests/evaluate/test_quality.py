"""Evaluation of caches that let tokens go: what is read as a prompt, and what is measured behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einfold
from einfold.evaluate.quality import Quality, evaluate
from einfold.evaluate.recall import KeyPlace, Recall, windows
from einfold.evaluate.texts import document
from einfold.model import Model

KEY = "The pass key is 12. Remember it.\n"
QUESTION = "What is the pass key? The pass key is 12."
TEXT = f"the text of the model\n{KEY}is hidden in the text\n{QUESTION}\n\f\n" + "the pass key " * 12


def characters(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """A token a character."""
    return [ord(c) for c in text], [(i, i + 1) for i in range(len(text))]


def test_keys_are_found_by_tokens() -> None:
    text = "abc" + KEY + "more\n" + QUESTION
    (window,) = windows(characters, [document(text)], 500)
    asked = text.index("What")
    assert window.keys == (KeyPlace(3, asked, (len(text) - 3, len(text) - 2)),)
    assert window.keys[0].depth == 3 / asked


def test_keys_of_another_window_are_not_asked_for() -> None:
    text = "abc" + KEY + "more\n" + QUESTION
    cut = 60
    first, second = windows(characters, [document(text)], cut)
    assert (first.keys, second.keys) == ((), ())
    assert len(first.tokens) == cut and len(second.tokens) == len(text) - cut


def test_recall_by_depth_and_length() -> None:
    found = Recall()
    for stated, asked, hit in (
        (0, 100, True),
        (25, 100, False),
        (60, 200, True),
        (900, 1000, False),
    ):
        found.add(KeyPlace(stated, asked, (asked + 5,)), hit, True)
    assert found.share == 0.5
    assert found.reference_share == 1
    depths = [
        (part["above"], part["to"], part["keys"], part["recall"]) for part in found.by_depth()
    ]
    assert depths == [(0, 0.25, 2, 0.5), (0.25, 0.5, 1, 1.0), (0.75, 1, 1, 0.0)]
    lengths = [(part["above"], part["to"], part["keys"]) for part in found.by_length()]
    assert lengths == [(0, 128, 2), (128, 256, 1), (512, 1024, 1)]
    assert Recall().share is None and Recall().by_depth() == Recall().by_length() == []


def pruned(model: Path, out: Path, **options: Any) -> Model:
    """A model that keeps a window of tokens."""
    recipe = {"cache": {"prune": {"method": "streaming_llm", **options}}}
    einfold.compile(model, out, recipe=recipe, check=False)
    return einfold.load(out, engine="reference")


def measured(model: Model, original: Path, tmp_path: Path, **options: Any) -> Quality:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return evaluate(model, original, text, **options)


def test_a_window_that_nothing_leaves_loses_nothing(text_model: Path, tmp_path: Path) -> None:
    model = pruned(text_model, tmp_path / "a", sinks=4, recent=200, slack=8)
    found = measured(model, text_model, tmp_path, prompt=0.25)
    lengths = [len(model.encode(part)) for part in TEXT.split("\n\f\n")]
    assert found.tokens == sum(length - int(length * 0.25) - 1 for length in lengths)
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-5)
    assert abs(found.kl) < 1e-6 and found.top1 == 1
    assert (found.recall, found.keys, found.prompt) == (found.reference_recall, 1, 0.25)
    assert [part["keys"] for part in found.recall_by_depth] == [1]


def test_what_leaves_costs_quality(text_model: Path, tmp_path: Path) -> None:
    model = pruned(text_model, tmp_path / "a", sinks=1, recent=4, slack=4)
    found = measured(model, text_model, tmp_path)
    assert found.kl > 0.01
    sizes = found.bytes
    assert sizes["predicted"] == sizes["measured"] and sizes["cache"] < sizes["cache_peak"]
    assert not found.note
    streamed = measured(model, text_model, tmp_path, prompt=0.0)
    assert "no prompt was read" in streamed.note and streamed.data()["note"] == streamed.note


def test_the_rest_is_read_as_it_would_be_decoded(text_model: Path, tmp_path: Path) -> None:
    """A slack of 1 makes every step one token long, as decoding does."""
    model = pruned(text_model, tmp_path / "a", sinks=2, recent=6, slack=1)
    result = model.generate("the text of the model is hidden", max_new_tokens=12, ignore_eos=True)
    prompt = model.encode("the text of the model is hidden")
    rows = np.concatenate(
        [logits.copy() for _, logits in model.logits(prompt + result.tokens, len(prompt))]
    )
    assert rows.argmax(-1).tolist()[:-1] == result.tokens[1:]


def test_shares_that_are_none(text_model: Path, text_artifact: Path) -> None:
    model = einfold.load(text_artifact)
    with pytest.raises(einfold.errors.PromptError, match="less than 1, not 1"):
        evaluate(model, text_model, prompt=1.0)
    with pytest.raises(einfold.errors.PromptError, match="leaves nothing of 3"):
        next(model.logits([1, 2, 3], 3))
