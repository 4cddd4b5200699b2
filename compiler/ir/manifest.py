"""The manifest of an artifact: what it holds, with hashes, and how it was made. Needs no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import ArtifactError, IRError
from .kv.layout import CacheLayout
from .regular import read_regular

#: Version of the folder's layout. A reader refuses what is newer than it knows.
FORMAT = 1
NAME = "manifest.json"
WEIGHTS = "weights.safetensors"
GRAPH = "graph.eir"
MODEL = "model.onnx"

#: In the metadata of model.onnx, two numbers: a cache for so many tokens or more (the second) is stepped over
#: faster where its slots are a multiple of the first.
BLOCKS = "einfold.blocks"


#: The most bytes of a manifest: a hundred layers of a hundred groups are a tenth of it.
_LARGEST = 1 << 24


#: A number of bytes or parameters.
Count = Annotated[int, Field(ge=0, lt=1 << 62)]


#: A name that a target gives.
Word = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Part):
    """Size and BLAKE3 hash (hex) of one file of the artifact."""

    bytes: Count
    blake3: str


class ModelEntry(_Part):
    """The model that was compiled."""

    source: str
    architecture: str
    vocabulary: Annotated[int, Field(ge=1, lt=1 << 31)]
    context: Annotated[int, Field(ge=1, lt=1 << 31)]
    hidden: Count
    parameters: Count
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None


class Manifest(_Part):
    """Everything that the runtime must know before it opens the model."""

    format: int = FORMAT
    einfold: str
    created: str
    target: Word
    flavour: Word
    """Which operators the target's code is written in, such as onnxruntime's own, `ort`, or `torch`."""
    model: ModelEntry
    recipe: dict[str, Any]
    cache: tuple[str, ...]
    """The cache layout, a line a head group."""
    weight_bytes: Count
    cache_bytes: str
    """The account: bytes as an expression in B (rows) and C (tokens of capacity), for people to read."""
    versions: dict[str, str]
    files: dict[str, FileEntry]

    def layout(self) -> CacheLayout:
        """The cache layout, read from its lines."""
        try:
            layout = CacheLayout.parse(list(self.cache))
        except IRError as error:
            raise ArtifactError(f"the manifest describes a cache that is none: {error}") from error
        if layout is None:
            raise ArtifactError("the manifest describes no KV cache")
        return layout

    def dump(self) -> bytes:
        """The one byte form of this manifest; its last member is a hash of all that stands before."""
        data = self.model_dump(mode="json")
        data["blake3"] = _hash(data)
        return _encode(data)

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Reads and checks a folder's manifest. Raises ArtifactError where it is absent, damaged or newer."""
        path = folder / NAME
        if not os.path.lexists(path):
            what = f"{folder} is no einfold artifact: it has no {NAME}"
            if (folder / "config.json").is_file():
                what += f"; a model folder is compiled first: einfold compile {folder} -o OUT"
            raise ArtifactError(what)
        raw = read_regular(path, _LARGEST)
        try:
            data = json.loads(raw)
            version = data["format"]
            found = data.pop("blake3", None)
            whole = found == _hash(data) and raw == _encode(data | {"blake3": found})
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ArtifactError(
                f"{path} is damaged: it is not the JSON that einfold writes"
            ) from None
        if type(version) is not int or version > FORMAT:
            raise ArtifactError(
                f"{path} has format {version}, this einfold reads up to {FORMAT}; install a newer einfold"
            )
        if not whole:
            raise ArtifactError(f"{path} is damaged: its contents do not match its hash")
        try:
            manifest = Manifest.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ArtifactError(f"{path} is not valid: {where[:200]!r}: {first['msg']}") from error
        for name in manifest.files:
            check_name(name)
        return manifest


def check_name(name: str) -> None:
    """Raises ArtifactError for a file name that would leave the artifact's folder."""
    path = PurePosixPath(name)
    if (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or not name.isprintable()
        or len(name) > 255
        or ":" in name
        or str(path) in ("", ".")
    ):
        raise ArtifactError(
            f"the manifest names the file {name[:255]!r}, which lies outside the artifact"
        )


def _encode(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def _hash(data: dict[str, Any]) -> str:
    return blake3(_encode(data)).hexdigest()
