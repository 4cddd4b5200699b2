"""What encoder-decoders do not do is refused by its reason, and so is an artifact that is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import einfold
from einfold.compiler.driver import open_model, wrap_model
from einfold.compiler.ir.manifest import Manifest
from einfold.errors import ArtifactError, ModelError, RecipeError, UnsupportedError
from einfold.evaluate import encoder_decoder_check

from ..hostile import forge
from ..quick import rarely
from . import common

Made = Callable[[str], Path]


def folder_of(kind: str, architecture: str, folder: Path, **options: Any) -> Path:
    """A folder with a config alone: nothing further is read."""
    config = getattr(transformers, f"{kind}Config")(**options)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


_SMALL = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
_SMALL |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
_TRANSLATES = _SMALL | {"src_vocab_size": 50, "tgt_vocab_size": 50, "langs": ["a", "b"]}


@pytest.mark.parametrize(
    ("kind", "architecture", "options", "said"),
    [
        ("T5", "T5EncoderModel", {}, "T5EncoderModel is an encoder-decoder.* no other heads"),
        ("Bart", "BartForSequenceClassification", {}, "no other heads"),
        ("VisionEncoderDecoder", "VisionEncoderDecoderModel", {}, "none whose encoder .* images"),
        ("EncoderDecoder", "EncoderDecoderModel", {}, "put together of two models"),
        ("Speech2Text", "Speech2TextForConditionalGeneration", {}, "spectrograms of one length"),
        rarely(
            "M2M100",
            "M2M100ForConditionalGeneration",
            _SMALL,
            "numbers the tokens that it writes",
        ),
        ("FSMT", "FSMTForConditionalGeneration", _TRANSLATES, "'fsmt' cannot be compiled"),
    ],
)
def test_what_is_missing_is_named(
    kind: str, architecture: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    if "EncoderDecoder" in kind:
        first = transformers.ViTConfig if kind.startswith("Vision") else transformers.BertConfig
        parts = {"encoder": first(), "decoder": transformers.BertConfig()}
        options = {name: part.to_dict() for name, part in parts.items()}
    folder = folder_of(kind, architecture, tmp_path / "m", **options)
    with pytest.raises(UnsupportedError, match=said):
        einfold.estimate(folder)


@pytest.mark.parametrize(
    ("name", "options", "error", "said"),
    [
        ("t5", {"target": "triton"}, UnsupportedError, "is an encoder-decoder: the target triton"),
        ("t5", {"quant": "kivi"}, RecipeError, "adds relative positions|onnx"),
        ("bart", {"context": 65}, RecipeError, "context 65 is longer than the 64 tokens"),
        ("whisper", {"context": 65}, RecipeError, "context 65 is longer than the 64 tokens"),
    ],
)
def test_what_a_recipe_asks_in_vain(
    name: str, options: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    kind, config = common.MODELS[name]
    folder = folder_of(
        kind.removesuffix("ForConditionalGeneration"), kind, tmp_path / "m", **config
    )
    with pytest.raises(error, match=said):
        einfold.estimate(folder, **options)


def test_relative_positions_have_no_end() -> None:
    """A length that a config of T5's names is what it was trained on, and no bound."""
    found = wrap_model(common.build("t5"))
    assert found.pair is not None
    assert found.pair.context(found.source, found.config, None) == 64
    assert found.pair.context(found.source, found.config, 96) == 96


def test_a_cache_for_transformers_is_of_language_models(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="is an encoder-decoder, whose cache"):
        einfold.cache_for(common.build("bart"), cache="int8")


def test_what_a_folder_asks_of_a_search_is_noted(tmp_path: Path) -> None:
    folder = common.save("bart", tmp_path / "m")
    transformers.GenerationConfig(num_beams=4, decoder_start_token_id=2).save_pretrained(folder)
    assert any("num_beams 4" in note for note in open_model(folder).notes)
    assert wrap_model(common.build("bart")).pair is not None


def test_no_start_token_is_told_at_once() -> None:
    model = common.build("t5")
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id = settings.bos_token_id = None
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        wrap_model(model)


@pytest.mark.slow
def test_a_decoder_that_is_not_the_models_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check compares with transformers, and refuses what differs."""
    plain = encoder_decoder_check._answer

    def other(*arguments: Any) -> Any:
        given, logits = plain(*arguments)
        return given, logits * 1.001

    monkeypatch.setattr(encoder_decoder_check, "_answer", other)
    with pytest.raises(einfold.errors.EinfoldError, match="the decoder that was captured is not"):
        einfold.compile(common.build("bart"), tmp_path / "out", target="reference")


@pytest.fixture
def copy(compiled_pair: Made, tmp_path: Path) -> Path:
    return forge.copy(compiled_pair("t5"), tmp_path / "copy")


def _output(place: int, **change: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["outputs"][place].update(change)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(begin=None),
        lambda data: data.update(outputs=[]),
        lambda data: data.update(inputs=[]),
        lambda data: data["outputs"].pop(),
        lambda data: data["outputs"].append(dict(data["outputs"][0], name="more")),
        lambda data: data["outputs"].append(data["outputs"][1]),
        lambda data: data["begin"].update(tokens=[]),
        lambda data: data["begin"].update(tokens=[96]),
        lambda data: data["begin"].update(tokens=[0] * 64),
        lambda data: data["begin"].update(never=list(range(96))),
        lambda data: data["begin"].update(never_first=[-1]),
        lambda data: data["model"].update(context=0),
        lambda data: data.update(kind="encoder"),
        lambda data: data.update(kind="causal_lm"),
        _output(1, dtype="f16"),
        _output(1, shape=["B", "4", "S"]),
        _output(1, shape=["B", "S", "S", "16"]),
        _output(1, shape=["B", "4", "7", "16"]),
        _output(0, shape=["B", "T"]),
    ],
)
def test_manifests_that_are_none(change: Callable[[dict[str, Any]], None], copy: Path) -> None:
    forge.edit(copy, change)
    with pytest.raises(ArtifactError, match=r"manifest\.json is not valid"):
        Manifest.read(copy)


@pytest.mark.parametrize("engine", ["onnx", "reference"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_output(1, shape=["B", "4", "S", "8"]), "cross_0_key|other tensors"),
        (lambda data: data["files"].pop("encoder.onnx"), "has no encoder.onnx"),
        (lambda data: data["files"].pop("encoder.eir"), "has no encoder.eir"),
        (lambda data: data["inputs"].pop(), "attention_mask|other tensors"),
    ],
)
def test_programs_that_are_not_what_the_manifest_says(
    change: Callable[[dict[str, Any]], None], said: str, engine: str, copy: Path
) -> None:
    forge.edit(copy, change)
    other = {"onnx": ".eir", "reference": ".onnx"}[engine]
    if other in said:
        assert einfold.load(copy, engine=engine) is not None  # it reads the other file
        return
    with pytest.raises(ArtifactError, match=said):
        einfold.load(copy, engine=engine)


def test_programs_that_changed_places(copy: Path) -> None:
    for one, other in (("graph.eir", "encoder.eir"), ("model.onnx", "encoder.onnx")):
        first, second = (copy / one).read_bytes(), (copy / other).read_bytes()
        forge.change(copy, one, second)
        forge.change(copy, other, first)
    for engine in ("onnx", "reference"):
        with pytest.raises(ArtifactError):
            einfold.load(copy, engine=engine)
