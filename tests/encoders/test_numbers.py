"""Encoders are what transformers computes, by `compile` and by `export_onnx`, in both flavours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import einfold

from ..quick import rarely
from . import common

TOLERANCE = 1e-4


def images(rows: int) -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    }


def calls(name: str) -> list[dict[str, Any]]:
    if name == "vit":
        return [images(1), images(4)]
    return [common.texts(1, 1), common.texts(4, 5), common.texts(2, 33)]


def wanted(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        found = common.build(name)(**inputs)
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("name", ["bert", rarely("deberta"), rarely("vit")])
def test_what_transformers_computes(
    name: str, compiled_encoder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = common.save(name, tmp_path / "m")
    path = einfold.export_onnx(folder, tmp_path / "e", portable=True)
    compiled = einfold.load(compiled_encoder(name), threads=1)
    exported = onnxruntime.InferenceSession(str(path))
    reference = einfold.load(tmp_path / "e", engine="reference")
    for inputs in calls(name):
        arrays = {key: value.numpy() for key, value in inputs.items()}
        whole = compiled.engine._checked(arrays)  # with the inputs that were left out
        names = [node.name for node in exported.get_outputs()]
        for found in (
            compiled.run(arrays),
            reference.run(arrays),
            dict(zip(names, exported.run(names, whole), strict=True)),
        ):
            expected = wanted(name, inputs)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert common.share(found[key], value, inputs.get("attention_mask")) < TOLERANCE


@pytest.mark.parametrize("name", ["classifier", "roberta"])
def test_heads_are_those_of_the_folder(name: str, tmp_path: Path) -> None:
    """In memory too; RoBERTa's tables have rows for padding, so that a text is two tokens shorter."""
    model = common.build(name)
    report = einfold.compile(model, tmp_path / "out", target="reference")
    assert report.manifest.model.context == (62 if name == "roberta" else 64)
    inputs = common.texts(3, 9)
    if name == "roberta":
        inputs["input_ids"][inputs["attention_mask"] == 0] = 1
    found = einfold.load(tmp_path / "out").run({k: v.numpy() for k, v in inputs.items()})
    with torch.no_grad():
        expected = model(**inputs).logits
    assert common.share(found["logits"], expected, inputs["attention_mask"]) < TOLERANCE


@pytest.mark.parametrize("poolings", [rarely(("mean_tokens",)), ("cls_token", "max_tokens")])
def test_an_embedder_of_sentences(poolings: tuple[str, ...], tmp_path: Path) -> None:
    folder = common.save_embedder(tmp_path / "m", poolings)
    portable = len(poolings) > 1
    path = einfold.export_onnx(folder, tmp_path / "out", portable=portable)
    model = einfold.load(path.parent, threads=1)
    assert model.artifact.manifest.model.context == 48
    for rows, tokens in ((1, 1), (3, 7), (2, 48)):
        inputs = common.texts(rows, tokens)
        found = model.run({key: value.numpy() for key, value in inputs.items()})
        assert found.keys() == {"sentence_embedding"}
        expected = common.embeddings(inputs, poolings)
        assert common.share(found["sentence_embedding"], expected) < TOLERANCE


@pytest.mark.slow
def test_rounded_weights_stay_near(tmp_path: Path) -> None:
    """int8 of BERT, and int4 of ViT, whose patches are a product: a third and a fifth of the bytes."""
    for name, weights, bytes_, bound in (("bert", "int8", 0.4, 0.03), ("vit", "int4", 0.3, 0.3)):
        folder = common.save(name, tmp_path / name)
        report = einfold.compile(folder, tmp_path / f"{name}.out", weights=weights)
        manifest = report.manifest
        assert manifest.weight_bytes < bytes_ * 4 * manifest.model.parameters
        inputs = calls(name)[1]
        found = einfold.load(tmp_path / f"{name}.out").run(
            {k: v.numpy() for k, v in inputs.items()}
        )
        for key, value in wanted(name, inputs).items():
            off = common.share(found[key], value, inputs.get("attention_mask"))
            assert 1e-5 < off < bound
        assert 1e-5 < report.check["share of the original's results that it is off by"] < bound
