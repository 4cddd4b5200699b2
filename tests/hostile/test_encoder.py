"""Artifacts of encoders from strangers: what they take and give is what the manifest lists, or a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

import einfold
from einfold.errors import ArtifactError

from ..encoders import common
from . import forge


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoder")
    einfold.compile(common.save("bert", root / "m"), root / "out", check=False)
    return root / "out"


def _entry(part: str, place: int, **change: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data[part][place].update(change)


@pytest.mark.parametrize(
    "how",
    [
        lambda data: data.update(kind="decoder"),
        lambda data: data.update(kind="causal_lm"),
        lambda data: data.update(inputs=[]),
        lambda data: data.update(outputs=data["outputs"][:1]),
        lambda data: data.update(cache=["cache 0.0 heads=0 of=1"]),
        _entry("inputs", 0, shape=["B", "99999999999"]),
        _entry("inputs", 0, dtype="u8"),
        _entry("inputs", 1, name="input_ids"),
        _entry("inputs", 0, name="pixel_values", dtype="f32", shape=["B", "3"], below=0),
        _entry("outputs", 0, shape=["S", "B", "64"]),
        _entry("outputs", 0, shape=["B"] * 20),
        _entry("outputs", 0, name="../x"),
        _entry("outputs", 0, shape=["B", "S", "32"]),
    ],
)
@pytest.mark.parametrize("engine", ["onnx", "reference"])
def test_manifests_that_are_of_another_model(
    how: Callable[[dict[str, Any]], None], engine: str, base: Path, tmp_path: Path
) -> None:
    folder = forge.edit(forge.copy(base, tmp_path / "copy"), how)
    with pytest.raises(ArtifactError):
        einfold.load(folder, engine=engine).run([[4, 5]])


def test_ids_past_the_table_end_in_a_sentence(base: Path, tmp_path: Path) -> None:
    """The manifest may allow what the weights have not."""

    def wide(data: dict[str, Any]) -> None:
        data["inputs"][0]["below"] = 10**6
        data["model"]["context"] = 10**6

    folder = forge.edit(forge.copy(base, tmp_path / "copy"), wide)
    for engine in ("onnx", "reference"):
        with pytest.raises(ArtifactError, match="cannot be run"):
            einfold.load(folder, engine=engine).run([[4, 5000]])


def test_operators_are_those_of_the_list(base: Path, tmp_path: Path) -> None:
    folder = forge.copy(base, tmp_path / "a")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node.insert(0, helper.make_node("RandomNormalLike", ["input_ids"], ["evil"]))
    forge.change(folder, "model.onnx", model.SerializeToString())
    with pytest.raises(ArtifactError, match="RandomNormalLike"):
        einfold.load(folder)
    text = (base / "graph.eir").read_text()
    for evil, said in (
        (
            text.replace("%value_", "%value_").replace("aten.tanh.default", "aten.tanh_.default"),
            "tanh_",
        ),
        (_with_dropout(text), "draws random numbers"),
    ):
        assert evil != text
        folder = forge.change(forge.copy(base, tmp_path / "b"), "graph.eir", evil.encode())
        with pytest.raises(ArtifactError, match=said):
            einfold.load(folder, engine="reference")


def _with_dropout(text: str) -> str:
    """The graph with torch's attention, which draws what it drops, in the place of einfold's."""
    lines = text.splitlines()
    place = next(i for i, line in enumerate(lines) if "einfold.softmax_attention(" in line)
    head, _, tail = lines[place].partition("einfold.softmax_attention(")
    names = ", ".join(tail.partition(")")[0].split(", ")[:3])
    kind = tail.rpartition(") : ")[2]
    lines[place] = f"{head}aten.scaled_dot_product_attention.default({names}, none, 0.5) : {kind}"
    return "\n".join(lines) + "\n"
