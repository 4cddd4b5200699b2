"""Damaged, newer and malicious artifacts are refused with a sentence that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import einfold
from einfold.compiler.ir.manifest import FORMAT, Manifest, _encode, _hash
from einfold.errors import ArtifactError
from einfold.runtime.artifact import Artifact


@pytest.fixture
def copy(text_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(text_artifact, tmp_path / "copy"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest changed by somebody who can compute its hash."""
    data = json.loads((folder / "manifest.json").read_text())
    data.pop("blake3")
    change(data)
    (folder / "manifest.json").write_bytes(_encode(data | {"blake3": _hash(data)}))


def test_every_file_is_listed(copy: Path) -> None:
    manifest = Manifest.read(copy)
    assert set(manifest.files) | {"manifest.json"} == {path.name for path in copy.iterdir()}
    assert manifest.dump() == (copy / "manifest.json").read_bytes()


def test_a_changed_byte_anywhere_is_found(copy: Path) -> None:
    for path in sorted(copy.iterdir()):
        data = path.read_bytes()
        for place in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(ArtifactError, match=path.name):
                Artifact.open(copy)
        with pytest.raises(ArtifactError, match=path.name):
            einfold.load(copy)
        path.write_bytes(data)
    Artifact.open(copy)


def test_cut_and_missing_files(copy: Path) -> None:
    weights = copy / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="damaged"):
        Artifact.open(copy, verify=False)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"lacks .*weights.safetensors"):
        Artifact.open(copy)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", "..\\evil", "C:evil", "."])
def test_paths_that_leave_the_folder(copy: Path, name: str) -> None:
    rewrite(copy, lambda data: data["files"].update({name: {"bytes": 1, "blake3": "00"}}))
    with pytest.raises(ArtifactError, match="outside the artifact"):
        Artifact.open(copy)


def test_links_that_leave_the_folder(copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.move(copy / "report.html", outside)
    (copy / "report.html").symlink_to(outside)
    with pytest.raises(ArtifactError, match="leads out of"):
        Artifact.open(copy)


def test_external_data_that_leaves_the_folder(copy: Path, tmp_path: Path) -> None:
    """A model whose weights point elsewhere is refused even where its hash is right."""
    import onnx

    model = onnx.load(copy / "model.onnx", load_external_data=False)
    (tmp_path / "secret").write_bytes(b"x" * 10**6)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    from einfold.compiler.artifact import file_entry

    entry = file_entry(copy / "model.onnx")
    rewrite(copy, lambda data: data["files"].update({"model.onnx": entry.model_dump()}))
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        einfold.load(copy)


def test_a_newer_format(copy: Path) -> None:
    rewrite(copy, lambda data: data.update(format=FORMAT + 1, invention="unknown to this version"))
    with pytest.raises(ArtifactError, match=rf"format {FORMAT + 1}.*newer einfold"):
        Artifact.open(copy)


def test_unknown_and_missing_members(copy: Path) -> None:
    original = (copy / "manifest.json").read_bytes()
    rewrite(copy, lambda data: data.update(extra=1))
    with pytest.raises(ArtifactError, match="extra"):
        Artifact.open(copy)
    (copy / "manifest.json").write_bytes(original)
    rewrite(copy, lambda data: data.pop("cache"))
    with pytest.raises(ArtifactError, match="cache"):
        Artifact.open(copy)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"format": "x"}'])
def test_a_manifest_that_is_none(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Artifact.open(copy)


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact folder"):
        einfold.load(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="no einfold artifact"):
        einfold.load(tmp_path)


def test_a_graph_that_is_no_graph_is_not_evaluated(copy: Path) -> None:
    """The reference engine parses the graph's text; what is no operator of the IR is refused."""
    graph = copy / "graph.eir"
    graph.write_text(graph.read_text().replace("einfold.embedding", "os.system", 1))
    from einfold.compiler.artifact import file_entry

    entry = file_entry(graph)
    rewrite(copy, lambda data: data["files"].update({"graph.eir": entry.model_dump()}))
    with pytest.raises(einfold.errors.EinfoldError, match="not an operator"):
        einfold.load(copy, engine="reference")


@pytest.mark.parametrize("name", ["weights.safetensors", "model.onnx"])
def test_a_manifest_that_leaves_out_a_file(copy: Path, name: str) -> None:
    rewrite(copy, lambda data: data["files"].pop(name))
    with pytest.raises(ArtifactError, match=f"has no {name}"):
        einfold.load(copy)


@pytest.mark.parametrize("line", ["", "layer 0", "layer 0 heads x"])
def test_a_cache_that_is_none(copy: Path, line: str) -> None:
    rewrite(copy, lambda data: data.update(cache=[line]))
    with pytest.raises(einfold.errors.EinfoldError):
        einfold.load(copy)
