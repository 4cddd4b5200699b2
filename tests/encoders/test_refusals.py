"""What is no encoder of one input, or brings what is not known, is refused by what is missing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import einfold
from einfold.compiler.codegen.reference.runner import ReferenceCaller
from einfold.compiler.driver import open_model
from einfold.errors import EinfoldError, ModelError, UnsupportedError
from einfold.evaluate import encoder_check

from . import common


@pytest.mark.parametrize(
    ("kind", "architecture", "options", "said"),
    [
        ("Blip", "BlipModel", {}, "reads image and text together"),
        ("CLIP", "CLIPModel", {}, "reads image and text together"),
        ("Wav2Vec2", "Wav2Vec2Model", {}, "reads input_values"),
        ("Bert", "BertForNextSentencePrediction", {}, "is a head that einfold does not compile"),
    ],
)
def test_what_is_missing_is_named(
    kind: str, architecture: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    config = getattr(transformers, f"{kind}Config")(**options)
    config.architectures = [architecture]
    config.save_pretrained(tmp_path / "m")
    for work in (einfold.estimate, lambda folder: einfold.export_onnx(folder, tmp_path / "out")):
        with pytest.raises(UnsupportedError, match=said):
            work(tmp_path / "m")


def _options(change: dict[str, Any], file: str) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(data | change))

    return changed


def _module(**change: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        listed = json.loads((folder / "modules.json").read_text())
        listed[3] |= change
        (folder / "modules.json").write_text(json.dumps(listed))

    return changed


def _drop_bias(folder: Path) -> None:
    path = folder / "2_Dense" / "model.safetensors"
    save_file({"linear.weight": load_file(path)["linear.weight"]}, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            _options({"pooling_mode_lasttoken": True}, "1_Pooling/config.json"),
            "pooling by lasttoken",
        ),
        (_options({"pooling_mode_mean_tokens": False}, "1_Pooling/config.json"), "by nothing"),
        (_options({"activation_function": "x.Cube"}, "2_Dense/config.json"), "activation Cube"),
        (_module(type="mine.LSTM"), "not LSTM at place 3"),
        (_module(path="../../etc"), "outside of the folder"),
        (lambda folder: (folder / "modules.json").write_text("{"), "cannot be read as JSON"),
        (_drop_bias, "holds no linear.bias"),
    ],
)
def test_parts_of_embedders_that_are_not_known(
    change: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    folder = common.save_embedder(tmp_path / "m")
    change(folder)
    with pytest.raises((ModelError, UnsupportedError), match=said):
        einfold.compile(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_would_be_done_to_a_text_is_noted(tmp_path: Path) -> None:
    folder = common.save_embedder(tmp_path / "m")
    _options({"do_lower_case": True}, "sentence_bert_config.json")(folder)
    (folder / "config_sentence_transformers.json").write_text('{"default_prompt_name": "query"}')
    notes = open_model(folder).notes
    assert ["lower case" in notes[0], "prompt 'query'" in notes[1]] == [True, True]


@pytest.mark.slow
def test_an_original_that_cannot_be_run_here_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact is then compared with its graph alone; one that is off is refused all the same."""

    def fails(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(encoder_check, "original_outputs", fails)
    folder = common.save("classifier", tmp_path / "m")
    report = einfold.compile(folder, tmp_path / "out", target="reference")
    (record,) = [record for record in report.passes if record.name == "compare_original"]
    assert "cannot be run here: no such kernel" in record.notes[0].what
    assert report.check["batches"] == 4 and "bound on that" not in report.check
    call, count = ReferenceCaller.call, itertools.count()

    def drifts(self: ReferenceCaller, given: Any) -> Any:
        return {name: value + next(count) for name, value in call(self, given).items()}

    monkeypatch.setattr(ReferenceCaller, "call", drifts)
    with pytest.raises(EinfoldError, match="differs from its graph"):
        einfold.compile(folder, tmp_path / "other", target="reference")


def test_a_graph_that_is_not_the_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encoder_check.original_outputs

    def other(*given: Any) -> Any:
        return {name: 1.001 * value for name, value in whole(*given).items()}

    monkeypatch.setattr(encoder_check, "original_outputs", other)
    with pytest.raises(EinfoldError, match="what was captured is not the model"):
        einfold.compile(
            common.save("classifier", tmp_path / "m"), tmp_path / "out", target="reference"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_weights_of_other_heads_are_noted_and_missing_ones_refused(tmp_path: Path) -> None:
    """A masked language model's checkpoint has no pooler, and a head that BERT alone does not read."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**common.MODELS["bert"][1])
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "m")
    config.architectures = ["BertModel"]
    config.save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"numbers of weight pooler\.dense"):
        einfold.compile(tmp_path / "m", tmp_path / "out")
    common.save_embedder(tmp_path / "e")
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "e")
    report = einfold.compile(tmp_path / "e", tmp_path / "out", target="reference")
    assert any("that BertModel does not read, cls." in note for note in report.notes)
