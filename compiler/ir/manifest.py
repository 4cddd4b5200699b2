"""The manifest of an artifact: what it holds, with hashes, and how it was made. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...errors import ArtifactError, IRError
from .kv.layout import CacheLayout
from .regular import open_regular, read_regular

#: Version of the folder's layout. A reader refuses what is newer than it knows. 2 added encoders, and what
#: writes behind one.
FORMAT = 2
NAME = "manifest.json"
WEIGHTS = "weights.safetensors"
GRAPH = "graph.eir"
MODEL = "model.onnx"


@dataclass(frozen=True)
class Part:
    """One of the programs of an artifact: the file of its graph, and of what the target onnx makes of it."""

    graph: str = GRAPH
    model: str = MODEL


#: The program of an artifact; of an encoder-decoder the decoder.
WHOLE = Part()

#: The encoder of an encoder-decoder.
READER = Part("encoder.eir", "encoder.onnx")

#: In the metadata of model.onnx, two numbers: a cache for so many tokens or more (the second) is stepped over
#: faster where its slots are a multiple of the first.
BLOCKS = "einfold.blocks"


#: The most bytes of a manifest: a hundred layers of a hundred groups are a tenth of it.
_LARGEST = 1 << 24


#: A number of bytes or parameters.
Count = Annotated[int, Field(ge=0, lt=1 << 62)]


#: A name that a target gives.
Word = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]


Kind = Literal["causal_lm", "encoder", "encoder_decoder"]

#: The kind of a model that continues a text over a cache.
CAUSAL = "causal_lm"

#: The kind of a model that reads all of its input at once and gives tensors.
ENCODER = "encoder"

#: The kind of a model whose encoder reads all of its input at once, and whose decoder then writes text.
ENCODER_DECODER = "encoder_decoder"

#: What an encoder of texts is given, [B, S] each: tokens, which of them are no padding, and of which kind.
MASK = "attention_mask"
TEXT_INPUTS = ("input_ids", MASK, "token_type_ids")

#: Of the text part of a model of images: a table, of which token -1 - n stands for row n.
EMBEDDINGS = "embeddings"

#: What the encoder of an encoder-decoder tells of its padding, bool [B, S].
CROSS_MASK = "cross_mask"


def cross_name(layer: int, part: str) -> str:
    """What the encoder calls the keys or values (`part`) of a decoder layer's cross-attention."""
    return f"cross_{layer}_{part}"


#: Dims of a tensor, and tensors of a call, at most.
_RANK, _TENSORS = 8, 64

#: The same of what an encoder gives its decoder, two for each layer; and tokens that one begins with.
_CROSS, _BEGIN = 4096, 64


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Part):
    """Size and BLAKE3 hash (hex) of one file of the artifact."""

    bytes: Count
    blake3: str


class ModelEntry(_Part):
    """The model that was compiled. Vocabulary and context are 0 where it reads no tokens."""

    source: str
    architecture: str
    vocabulary: Annotated[int, Field(ge=0, lt=1 << 31)]
    context: Annotated[int, Field(ge=0, lt=1 << 31)]
    hidden: Count
    parameters: Count
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None


class TensorEntry(_Part):
    """An input or a result of an encoder: its name, and its type as graphs print it, such as `i64[B, S]`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
    dtype: Annotated[str, Field(pattern=r"^[a-z][a-z0-9]{1,7}$")]
    shape: Annotated[tuple[str, ...], Field(min_length=1, max_length=_RANK)]
    """Sizes: numbers, B (rows), S (tokens), or what is computed of these."""
    below: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    """Of whole numbers: how many there are, from 0 on. 0 where that is not bounded."""

    @model_validator(mode="after")
    def _by_rows(self) -> TensorEntry:
        if self.shape[0] != "B" or any(len(size) > 200 for size in self.shape):
            raise ValueError(f"{self.name} has no rows, or sizes that are none")
        return self

    @property
    def is_given(self) -> bool:
        """Whether it is what a call can give: whole numbers for each token, or numbers of fixed sizes."""
        if self.dtype == "i64":
            return self.shape == ("B", "S")
        sizes = self.shape[1:]
        numbers = all(size.isdecimal() and len(size) < 10 for size in sizes)
        return self.dtype == "f32" and numbers and not self.below and self.name not in TEXT_INPUTS

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """The sizes that are numbers, None for the others."""
        return tuple(int(size) if size.isdecimal() else None for size in self.shape)

    @property
    def beside(self) -> str:
        """Its type where a decoder takes it: T tokens were read, S is for new ones."""
        return f"{self.dtype}[{', '.join('T' if size == 'S' else size for size in self.shape)}]"

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(self.shape)}]"


class Begin(_Part):
    """How an encoder-decoder begins to write, and what it never does."""

    tokens: Annotated[tuple[int, ...], Field(min_length=1, max_length=_BEGIN)]
    """What stands before the first token that it chooses."""
    never: Annotated[tuple[int, ...], Field(max_length=1 << 20)] = ()
    """Tokens that it does not choose."""
    never_first: Annotated[tuple[int, ...], Field(max_length=1 << 20)] = ()
    """Tokens that it does not choose as the first."""


class Manifest(_Part):
    """Everything that the runtime must know before it opens the model."""

    format: int = FORMAT
    kind: Kind = "causal_lm"
    """A causal language model writes text over a cache; an encoder reads all of its input at once; an
    encoder-decoder reads so, and writes behind what it read."""
    einfold: str
    created: str
    target: Word
    flavour: Word
    """Which operators the target's code is written in, such as onnxruntime's own, `ort`, or `torch`."""
    model: ModelEntry
    recipe: dict[str, Any]
    inputs: Annotated[tuple[TensorEntry, ...], Field(max_length=_TENSORS)] = ()
    """Of an encoder: what a call gives. Of a causal language model: its table of embeddings, if any."""
    outputs: Annotated[tuple[TensorEntry, ...], Field(max_length=_CROSS)] = ()
    """Of an encoder: what a call gets. Of an encoder-decoder the decoder takes it."""
    begin: Begin | None = None
    """Of an encoder-decoder: how it begins to write."""
    cache: tuple[str, ...]
    """The cache layout, a line a head group; none for an encoder."""
    weight_bytes: Count
    cache_bytes: str
    """The account: bytes as an expression in B (rows) and C (tokens of capacity), for people to read; of an
    encoder-decoder also in T, tokens that were read."""
    versions: dict[str, str]
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _of_one_kind(self) -> Manifest:
        if self.kind == ENCODER:
            whole = bool(self.inputs) and 0 < len(self.outputs) <= _TENSORS and not self.cache
            whole = whole and all(entry.is_given for entry in self.inputs)
        else:
            whole = self.kind == ENCODER_DECODER or not (self.outputs or self.inputs)
            whole = whole or (self.kind == CAUSAL and not self.outputs and self._embeds())
            whole = whole and self.model.vocabulary > 0 and self.model.context > 0
        if self.kind == ENCODER_DECODER:
            whole = whole and all(entry.is_given for entry in self.inputs) and bool(self.inputs)
            whole = whole and self.begin is not None and _is_cross(self.outputs)
            whole = whole and self.begin is not None and self._knows(self.begin)
        whole = whole and (self.begin is None or self.kind == ENCODER_DECODER)
        if not whole:
            raise ValueError(f"it is not what a model of the kind {self.kind} has")
        return self

    def _embeds(self) -> bool:
        """Whether the one input listed is a table of embeddings."""
        shape = ("B", "S", str(self.model.hidden))
        return self.inputs == (TensorEntry(name=EMBEDDINGS, dtype="f32", shape=shape),)

    @property
    def embeds(self) -> int:
        """The width of the table of embeddings that is taken beside tokens, 0 where none is."""
        return self.model.hidden if self.kind == CAUSAL and self.inputs else 0

    @property
    def beside(self) -> tuple[TensorEntry, ...]:
        """What every step of a model that writes is given beside its tokens and cache."""
        return self.inputs if self.kind == CAUSAL else self.outputs

    def _knows(self, begin: Begin) -> bool:
        """Whether these are tokens of the vocabulary, and leave room for one more and one to choose."""
        never = {*begin.never, *begin.never_first}
        known = all(0 <= token < self.model.vocabulary for token in (*begin.tokens, *never))
        return (
            known and len(never) < self.model.vocabulary and len(begin.tokens) < self.model.context
        )

    def layout(self) -> CacheLayout:
        """The cache layout, read from its lines."""
        try:
            layout = CacheLayout.parse(list(self.cache))
        except IRError as error:
            raise ArtifactError(f"the manifest describes a cache that is none: {error}") from error
        if layout is None:
            raise ArtifactError("the manifest describes no KV cache")
        return layout

    def check_file(
        self, folder: Path, name: str, hash_of: Callable[[Path], str] | None = None
    ) -> Path:
        """A listed file. Raises ArtifactError where it is no regular file in the folder, or not of
        the size that is listed; with `hash_of` of another hash too."""
        entry, path = self.files[name], folder / name
        try:
            real = path.resolve(strict=True)
            inside = real.is_relative_to(folder.resolve())
        except FileNotFoundError:
            raise ArtifactError(f"the artifact lacks {path}, which its manifest lists") from None
        except (OSError, RuntimeError) as error:  # a link to itself, a name that is too long
            raise ArtifactError(f"{path} cannot be opened: {error}") from error
        if not inside:
            raise ArtifactError(f"{path} leads out of the artifact's folder")
        descriptor = open_regular(real)
        size = os.fstat(descriptor).st_size
        os.close(descriptor)
        if size != entry.bytes:
            raise ArtifactError(
                f"{path} has {size:,} bytes, the manifest says {entry.bytes:,}: it is damaged"
            )
        if hash_of is not None and hash_of(real) != entry.blake3:
            raise ArtifactError(f"{path} is damaged: its contents do not match the manifest's hash")
        return path

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


def _is_cross(entries: tuple[TensorEntry, ...]) -> bool:
    """Whether these are keys and values [B, K, S, D] of each layer, and perhaps a mask [B, S]; or with a
    number in the place of S, which is the same in all."""
    by_name = {entry.name: entry for entry in entries}
    mask = by_name.pop(CROSS_MASK, None)
    layers = len(by_name) // 2
    wanted = {cross_name(layer, part) for layer in range(layers) for part in ("key", "value")}
    if len(by_name) + (mask is not None) != len(entries) or by_name.keys() != wanted or not layers:
        return False
    read = {entry.shape[2] for entry in by_name.values() if len(entry.shape) == 4}
    fixed = all(
        entry.dtype == "f32"
        and len(entry.shape) == 4
        and all(size.isdecimal() and 0 < len(size) < 8 for size in (entry.shape[1], entry.shape[3]))
        for entry in by_name.values()
    )
    same = len(read) == 1 and all(
        size == "S" or (size.isdecimal() and len(size) < 10) for size in read
    )
    return fixed and same and (mask is None or str(mask) == "bool[B, S]")


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
