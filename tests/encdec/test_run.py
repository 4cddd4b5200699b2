"""`run` and `load` of encoder-decoders: texts, ids and arrays in, text out; what does not fit is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import einfold
from einfold.errors import PromptError

from ..cli.test_cli import einfold as cli
from . import common

Made = Callable[[str], Path]


def test_texts_are_read_and_answered(compiled_pair: Made) -> None:
    out = str(compiled_pair("t5"))
    told = json.loads(
        cli(
            "run",
            out,
            "-p",
            "the cat sat",
            "-p",
            "a mat",
            "--max-new-tokens",
            "5",
            "--ignore-eos",
            "--json",
        )
    )
    ids = torch.tensor([[7, 4, 5, 1], [3, 8, 1, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    model = common.build("t5")
    with torch.no_grad():
        expected = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=5,
            eos_token_id=None,
            past_key_values=common.no_cache(),
        )
    assert [row["tokens"] for row in told["rows"]] == expected[:, 1:].tolist()
    assert all(row["finish_reason"] == "length" for row in told["rows"])
    one = einfold.load(out).generate("the cat sat", max_new_tokens=5, ignore_eos=True)
    assert one.tokens == told["rows"][0]["tokens"] and one.text == told["rows"][0]["text"]
    assert one.prompt_tokens == 1
    printed = cli("run", out, "-p", "the cat sat", "--max-new-tokens", "5", "--ignore-eos")
    assert printed.strip() == one.text.strip()


def test_a_prefix_stands_before_the_answer(compiled_pair: Made) -> None:
    found = einfold.load(compiled_pair("t5"))
    assert found.start() == [0]
    assert found.start("the cat") == found.start([7, 4]) == [0, 7, 4]
    found = einfold.load(compiled_pair("t5"), engine="reference")
    given = common.arrays(common.inputs("t5", 1))
    answer = found.generate(given, prefix=[7, 4], max_new_tokens=4, ignore_eos=True)
    expected = common.logits(
        common.build("t5"), common.inputs("t5", 1), [[0, 7, 4, *answer.tokens]]
    )
    assert answer.tokens == expected[0, 2:-1].argmax(-1).tolist()


def test_sounds_are_arrays(compiled_pair: Made, tmp_path: Path) -> None:
    """What the config never lets begin an answer does not."""
    out, given = str(compiled_pair("whisper")), common.arrays(common.inputs("whisper"))
    np.save(tmp_path / "x.npy", given["input_features"])
    np.savez(tmp_path / "x.npz", **given)
    rows = ("--max-new-tokens", "4", "--ignore-eos", "--json")
    told = [
        json.loads(cli("run", out, "-f", str(tmp_path / name), *rows))["rows"]
        for name in ("x.npy", "x.npz")
    ]
    assert told[0] == told[1] and len(told[0]) == 2
    found = einfold.load(out)
    begin = found.artifact.manifest.begin
    assert begin.never_first == (5, 6) and begin.never == (58, 48, 64)
    logits = found.logits(given, [[1], [1]])[:, 0]
    logits[:, [5, 6, 58, 48, 64]] = -np.inf
    assert [row["tokens"][0] for row in told[0]] == logits.argmax(-1).tolist()
    printed = cli("run", out, "-f", str(tmp_path / "x.npy"), *rows[:3])
    assert printed.splitlines() == [" ".join(map(str, row["tokens"])) for row in told[0]]


@pytest.mark.parametrize(
    ("name", "arguments", "said", "code"),
    [
        ("t5", ["-p", "a", "--chat"], "--chat means nothing", 8),
        ("t5", ["-p", "a", "--output", "x.npz"], "--output means nothing", 8),
        ("t5", ["--ids", "4 999"], "input_ids of row 0 is 999 at position 1", 8),
        ("t5", ["-p", "a " * 80], "81 tokens, and the model reads 64", 8),
        ("t5", [], "give one prompt", 8),
        ("t5", ["-p", "a", "--prefix", "the " * 64], "the prompt has 65 tokens", 8),
        ("t5", ["-p", "a", "--engine", "triton"], "was compiled for onnx", 7),
        ("whisper", ["-p", "a"], "reads no text", 8),
        ("whisper", ["-f", "absent.npy"], "cannot read arrays", 8),
    ],
)
def test_what_does_not_fit_is_a_sentence(
    name: str, arguments: list[str], said: str, code: int, compiled_pair: Made
) -> None:
    assert said in cli("run", str(compiled_pair(name)), *arguments, code=code)


def test_arrays_that_do_not_fit(compiled_pair: Made) -> None:
    found = einfold.load(compiled_pair("t5"))
    given: dict[str, Any] = common.arrays(common.inputs("t5"))
    for change, said in (
        ({"attention_mask": np.zeros((2, 11), np.int64)}, "hides all tokens of row 0"),
        ({"attention_mask": given["attention_mask"][:1]}, "has the sizes"),
        ({"input_features": given["input_ids"]}, "takes no 'input_features'"),
        ({"input_ids": given["input_ids"] * 1.5}, "is of the type float64"),
    ):
        with pytest.raises(PromptError, match=said):
            found.generate_batch(given | change)
    with pytest.raises(PromptError, match="generate takes one row, and there are 2"):
        found.generate(given)
    with pytest.raises(PromptError, match="rows of one length, as many as the inputs"):
        found.logits(given, [[0, 1]])
    assert found.generate_batch([]) == []
    assert found.generate_batch(given, max_new_tokens=0)[0].tokens == []


def test_other_verbs_know_encoder_decoders(compiled_pair: Made) -> None:
    out = str(compiled_pair("t5"))
    shown = " ".join(cli("inspect", out).split())
    assert "takes input_ids i64[B, S]" in shown and "gives cross_1_value f32[B, 4, S, 16]" in shown
    assert "1024*B*C + 1025*B*T bytes for B rows of C tokens, T that were read" in shown
    graphs = cli("inspect", out, "--graph")
    assert graphs.count("einfold.ir 1") == 2 and "cached_attention" in graphs
    for verb in (["eval", out, "--against", out], ["bench", out]):
        assert "is an encoder-decoder" in cli(*verb, code=7)


@pytest.mark.slow
def test_an_estimate_is_what_is_held(compiled_pair: Made) -> None:
    """Weights to the byte; and what the encoder gives, of a text as long as the context, or of a sound."""
    folder = compiled_pair("t5")
    told = einfold.estimate(folder.parent / "model", batch=3)
    manifest = einfold.load(folder).artifact.manifest
    assert told.weights == manifest.weight_bytes
    assert told.cache == 3 * 64 * 1024
    assert told.given == 3 * 64 * (1024 + 1)
    assert told.total == told.weights + told.cache + told.activations + told.given
    assert manifest.cache_bytes == f"{told.cache_expression} + 1025*B*T"
    sound = einfold.load(compiled_pair("whisper"))
    assert sound.artifact.manifest.cache_bytes == "1024*B*C + 20480*B"
    given = sound.read(common.arrays(common.inputs("whisper", 3)))
    assert sum(array.nbytes for array in given.values()) == 3 * 20480
