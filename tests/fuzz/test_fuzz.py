"""A hundred mutated artifacts of each target end in a sentence or in tokens; `make fuzz` tries thousands."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..quick import quick
from .driver import compiled, fuzz

COUNT = 100


@pytest.mark.parametrize("target", quick(["onnx", "reference", "triton"], "onnx"))
def test_mutated_artifacts_end_in_a_sentence_or_in_tokens(target: str, tmp_path: Path) -> None:
    answers = list(fuzz(target, compiled(target, tmp_path), tmp_path, range(COUNT)))
    assert not [answer for answer in answers if answer["ended"] == "fault"]
    ended = {answer["ended"] for answer in answers}
    assert {"ran", "5"} <= ended  # some do no harm, and most are refused
