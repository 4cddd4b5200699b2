"""`run` and `load` of encoders: texts, ids and arrays in, JSON and .npz out; what does not fit is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import einfold
from einfold.errors import PromptError, RecipeError, UnsupportedError

from ..cli.test_cli import einfold as cli
from . import common

Made = Callable[[str], Path]


def test_texts_are_rows_of_json(compiled_encoder: Made, tmp_path: Path) -> None:
    out = str(compiled_encoder("bert"))
    told = json.loads(cli("run", out, "-p", "the cat sat", "-p", "a mat", "--threads", "1"))
    assert [row["tokens"] for row in told["rows"]] == [5, 4]
    ids = torch.tensor([[1, 8, 5, 6, 2], [1, 4, 9, 2, 0]])
    mask = torch.tensor([[1] * 5, [1] * 4 + [0]])
    with torch.no_grad():
        expected = common.build("bert")(input_ids=ids, attention_mask=mask)
    for place, row in enumerate(told["rows"]):
        tokens = expected.last_hidden_state[place, : row["tokens"]]
        assert common.share(row["last_hidden_state"], tokens) < 1e-4
        assert common.share(row["pooler_output"], expected.pooler_output[place]) < 1e-4


def test_arrays_go_in_and_out_as_npz(compiled_encoder: Made, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    np.save(tmp_path / "x.npy", pixels)
    np.savez(tmp_path / "x.npz", pixel_values=pixels)
    out, target = str(compiled_encoder("vit")), tmp_path / "y.npz"
    cli("run", out, "-f", str(tmp_path / "x.npz"), "--output", str(target))
    expected = einfold.load(out).run({"pixel_values": pixels})["logits"]
    with np.load(target, allow_pickle=False) as found:
        assert found.files == ["logits"]
        np.testing.assert_allclose(found["logits"], expected, atol=1e-5)
    told = json.loads(cli("run", out, "-f", str(tmp_path / "x.npy"), "--engine", "reference"))
    np.testing.assert_allclose([row["logits"] for row in told["rows"]], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "said", "code"),
    [
        ("bert", ["-p", "a", "--max-new-tokens", "3"], "--max-new-tokens means nothing", 8),
        (
            "bert",
            ["-p", "a", "--chat", "--temperature", "1"],
            "--chat, --temperature means nothing",
            8,
        ),
        ("bert", ["--ids", "4 999"], "input_ids of row 0 is 999 at position 1", 8),
        ("bert", ["-p", "a " * 80], "82 tokens, and the model reads 64", 8),
        ("bert", [], "give one prompt", 8),
        ("bert", ["-f", "absent.npz"], "cannot read arrays", 8),
        ("bert", ["-p", "a", "--output", "x.txt"], "writes a .npz", 6),
        ("bert", ["-p", "a", "--engine", "triton"], "was compiled for onnx", 7),
        ("vit", ["-p", "a"], "reads no text", 8),
        ("vit", ["--ids", "4"], "reads no text", 8),
    ],
)
def test_what_does_not_fit_is_a_sentence(
    name: str, arguments: list[str], said: str, code: int, compiled_encoder: Made
) -> None:
    assert said in cli("run", compiled_encoder(name), *arguments, code=code)


def test_other_verbs_know_encoders(compiled_encoder: Made) -> None:
    out = str(compiled_encoder("vit"))
    assert "takes    pixel_values f32[B, 3, 32, 32]" in cli("inspect", out)
    for verb in (["eval", out, "--against", out], ["bench", out]):
        assert "is an encoder, which writes no text" in cli(*verb, code=7)


def test_no_rows_give_no_rows(compiled_encoder: Made) -> None:
    model = einfold.load(compiled_encoder("bert"))
    assert {k: v.shape for k, v in model.run([]).items()} == {
        "last_hidden_state": (0, 0, 64),
        "pooler_output": (0, 64),
    }
    none = model.run({"input_ids": np.zeros((0, 7), np.int64)})
    assert none["last_hidden_state"].shape == (0, 7, 64)
    images = einfold.load(compiled_encoder("vit"))
    assert images.run({"pixel_values": np.zeros((0, 3, 32, 32))})["logits"].shape == (0, 2)


def test_rows_are_cut_into_batches(compiled_encoder: Made) -> None:
    model = einfold.load(compiled_encoder("bert"), threads=1)
    given = ["a cat", "the mat", "sat", "on the cat here", "a"]
    whole, cut = model.run(given), model.run(given, rows=2)
    for name, array in whole.items():
        np.testing.assert_allclose(cut[name], array, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"input_ids": [[1]], "pixels": [[1]]}, "takes no 'pixels'"),
        ({"attention_mask": [[1]]}, "wants 'input_ids'"),
        ({"input_ids": [[0.5]]}, "of the type float64"),
        ({"input_ids": [1]}, r"sizes \[1\]"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "where B is 1, S is 2"),
        ({"input_ids": [[1], [1]], "attention_mask": [[1], [0]]}, "hides all tokens of row 1"),
        ({"input_ids": [[-1]]}, "out of range"),
        ({"input_ids": [[1]], "token_type_ids": [[2]]}, "token_type_ids of row 0 is 2"),
        ({"input_ids": np.zeros((1, 0), np.int64)}, "rows of no tokens"),
        ("a text", "takes a list of texts"),
        ([["a"]], "flat list of token ids"),
        ([[]], "text 0 is empty"),
    ],
)
def test_inputs_that_do_not_fit(inputs: Any, said: str, compiled_encoder: Made) -> None:
    model = einfold.load(compiled_encoder("bert"))
    with pytest.raises(PromptError, match=said):
        model.run(inputs)


@pytest.mark.slow
def test_estimates_are_those_of_the_artifact(compiled_encoder: Made, tmp_path: Path) -> None:
    folder = common.save("bert", tmp_path / "m")
    found = einfold.estimate(folder, weights="int8", batch=4, budget=10**9)
    report = einfold.compile(folder, tmp_path / "out", weights="int8", check=False)
    assert found.weights == report.manifest.weight_bytes
    assert found.cache == 0 and found.largest_context == found.context == 64
    assert found.activations > 4 * 4 * 64 * 64
    with pytest.raises(RecipeError, match="reads no text"):
        einfold.estimate(common.save("vit", tmp_path / "v"), budget=10**9)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache": "int8"}, "cache.storage is about one"),
        ({"prune": "h2o"}, "cache.prune is about one"),
        ({"target": "triton"}, "is an encoder: the target triton"),
        ({"context": 65}, "context 65 is longer than the 64"),
    ],
)
def test_what_no_encoder_has_is_refused(options: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, UnsupportedError), match=said):
        einfold.compile(common.save("bert", tmp_path / "m"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
