"""Begin, end and padding tokens; tokenizers; models in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import einfold
from einfold.cli import main
from einfold.compiler.frontend.huggingface import ModelSource
from einfold.compiler.frontend.tokens import load_tokenizer, special_tokens
from einfold.errors import ModelError, RecipeError

from .. import models


class _Config:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def test_the_generation_config_goes_before_the_config() -> None:
    config = _Config(eos_token_id=2, bos_token_id=1, pad_token_id=None)
    assert special_tokens(config) == ((2,), 1, None)
    assert special_tokens(config, _Config(eos_token_id=[7, 2])) == ((7, 2), 1, None)
    assert special_tokens(_Config(), _Config(bos_token_id=[3])) == ((), 3, None)
    for wrong in ("2", [2, "x"], -1, 1.5):
        with pytest.raises(ModelError, match="eos_token_id"):
            special_tokens(config, _Config(eos_token_id=wrong))


def test_a_damaged_generation_config(text_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text_model, tmp_path / "m"))
    for text in ("[]", "{", json.dumps({"eos_token_id": "2"})):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(ModelError, match=r"generation_config\.json|eos_token_id"):
            einfold.compile(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_asks_no_hub(text_model: Path, tmp_path: Path) -> None:
    """It keeps its own end tokens; without a tokenizer the artifact takes token ids."""
    model = models.build("llama")
    model.generation_config.eos_token_id = [2, 9]
    with mock.patch.object(AutoTokenizer, "from_pretrained", side_effect=AssertionError):
        assert load_tokenizer(ModelSource("LlamaForCausalLM", None, in_memory=True))[0] is None
        made = einfold.compile(model, tmp_path / "out")
    assert made.manifest.model.eos_ids == (2, 9)
    assert made.tokenizer == "none: none was given with the model"
    assert "tokenizer.json" not in made.manifest.files
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    made = einfold.compile(model, tmp_path / "out", tokenizer=tokenizer, force=True)
    assert {"tokenizer.json", "chat_template.jinja"} <= made.manifest.files.keys()


def test_weights_without_numbers_and_engines_without_name(tmp_path: Path) -> None:
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(models.build("llama").config)
    with pytest.raises(ModelError, match="meta device"):
        einfold.compile(hollow, tmp_path / "out")
    with pytest.raises(RecipeError, match="'onyx' is none of onnx, triton, reference"):
        einfold.load(tmp_path, engine="onyx")  # type: ignore[arg-type]


def test_a_tokenizer_that_is_lost_is_told(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(text_model, tmp_path / "m"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json is damaged"):
        einfold.compile(folder, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    assert einfold.compile(folder, tmp_path / "a").tokenizer == "none: the model has none"
    (folder / "tokenizer.model").write_bytes(b"no sentencepiece model")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    made = einfold.compile(folder, tmp_path / "b")
    assert made.tokenizer.startswith("none: transformers cannot load it: ")
    command = ["einfold", "compile", str(folder), "-o", str(tmp_path / "c")]
    with mock.patch("sys.argv", command), pytest.raises(SystemExit):
        main()
    assert "takes token ids, not text" in capsys.readouterr().err


def test_a_slow_tokenizer_is_converted(text_model: Path, tmp_path: Path) -> None:
    """vocab.json and merges.txt alone, as GPT-2 had them."""
    folder = Path(shutil.copytree(text_model, tmp_path / "m"))
    inner = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(inner["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in inner["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    made = einfold.compile(folder, tmp_path / "out")
    assert made.tokenizer == "written by transformers"
    text = "the pass key is naïve"
    want = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert einfold.load(tmp_path / "out").encode(text) == want


def test_what_transformers_adds_is_kept(text_model: Path, tmp_path: Path) -> None:
    """A token that transformers puts in front, of which tokenizer.json knows nothing."""
    folder = Path(shutil.copytree(text_model, tmp_path / "m"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "the"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    einfold.compile(folder, tmp_path / "out")
    model = einfold.load(tmp_path / "out")
    for text in ("a pass key", "", "  12\n"):
        assert (model.encode(text) if text else model.tokenizer.encode(text)) == tokenizer(text)[
            "input_ids"
        ]
