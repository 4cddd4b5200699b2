"""GGUF, llama.cpp's format: one file with config, tokenizer and weights in blocks.

Every type of block is unpacked by the `gguf` package, a tensor at a time. Q4_0 and Q8_0 are blocks of 32
codes with a float16 scale and no minimum, which `Grouped` holds as they are, and `KQuant` holds Q2_K to Q6_K
(`gguf_blocks.py`); no scheme holds the others.

llama.cpp changes some weights when it converts a model, and each architecture here says how that is undone:
    llama          the rows of q and k, from pairs (i, i + d/2) of a head to pairs (2i, 2i + 1)
    gemma2, gemma3 norms, which compute 1 + w, are stored as 1 + w
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ....errors import ModelError, UnsupportedError, first_line, pass_on
from ...ir.quant.scheme import Scheme
from ...ir.stored import StoredWeight, picked
from ...ir.types import DTYPES
from ...ir.weights import Weight, derive
from ..checkpoint import FORMATS, Format
from ..gguf_file import GgufFile, read_gguf
from ..huggingface import ModelSource, quiet
from .gguf_blocks import KEPT, pieces_of

#: Keys of the header that change what the model computes, with the field of the config that has to agree.
_MEANT = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "attention.sliding_window": "sliding_window",
}

#: How a converted weight is undone: from (the weight, its name in the file, the config).
Undo = Callable[[Weight, str, Any], Weight]


def _as_it_is(weight: Weight, name: str, config: Any) -> Weight:
    return weight


def _llama(weight: Weight, name: str, config: Any) -> Weight:
    heads = {
        "attn_q": config.num_attention_heads,
        "attn_k": config.num_key_value_heads or config.num_attention_heads,
    }.get(name.split(".")[-2])
    if heads is None:
        return weight
    rows = torch.arange(weight.shape[0])
    return picked(weight, rows.view(heads, -1, 2).transpose(1, 2).flatten())


def _gemma(weight: Weight, name: str, config: Any) -> Weight:
    if not name.endswith("norm.weight"):
        return weight
    return derive([(weight.shape, weight.dtype)], lambda: (weight.load() - 1,))[0]


#: What is undone by architecture; no other is read.
_UNDO: dict[str, Undo] = {
    "llama": _llama,
    "qwen2": _as_it_is,
    "qwen3": _as_it_is,
    "phi3": _as_it_is,
    "gemma2": _gemma,
    "gemma3": _gemma,
}


#: What the header says of a model, by the names of transformers' configs.
_SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
}
_TAKEN = ("rope_theta",)
"""Fields that configs take and give other names."""
_FLOATS = {"rope.freq_base": "rope_theta", "attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
_MODEL_TYPES = {"gemma3": "gemma3_text"}

#: What a size that a header gives may be at most: what is built of it takes memory.
_LARGEST = 1 << 24


def package() -> Any:
    """The `gguf` package. Raises UnsupportedError where it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UnsupportedError(
            f"reading a GGUF needs the package gguf ({first_line(error)}); install einfold[gguf]"
        ) from error


def header(path: Path) -> GgufFile:
    """The header of a GGUF, checked. Raises ModelError, and UnsupportedError for an architecture or a
    version that is not read."""
    gguf = package()
    found = read_gguf(path, lambda kind: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)])
    if found.architecture not in _UNDO:
        raise UnsupportedError(
            f"{path}: models of the architecture {found.architecture!r} are not read from a GGUF; "
            f"those of {', '.join(_UNDO)} are, and of all others the folder that the file was made from"
        )
    scaling = [key for key in found.keys if ".rope.scaling." in key]
    if scaling and found.keys.get(f"{found.architecture}.rope.scaling.type") != "none":
        raise UnsupportedError(
            f"{path}: {scaling[0]} stretches the rotary embedding, which is not read of a "
            "GGUF; give the folder that the file was made from"
        )
    return found


@FORMATS.register
class Gguf(Format):
    """A single file; its config has been read by transformers."""

    name = "gguf"

    @staticmethod
    def read_config(source: ModelSource) -> Any:
        """A config of transformers' own class, from the keys of the header."""
        assert source.file is not None
        file = header(source.file)
        quiet()
        kind = _MODEL_TYPES.get(file.architecture, file.architecture)
        try:
            made = CONFIG_MAPPING[kind]
            known = {n: v for n, v in _config(file).items() if n in _TAKEN or hasattr(made(), n)}
            return made.from_dict(known | {"model_type": kind})
        except Exception as error:
            pass_on(error)
            raise ModelError(
                f"{source.file}: the header describes no {kind} model: {first_line(error)}"
            ) from error

    def read(self, model: nn.Module) -> dict[str, Weight]:
        assert self.source.file is not None
        file = header(self.source.file)
        self._check_config(file)
        undo = _UNDO[file.architecture]
        left, found = dict(file.tensors), {}
        for own, theirs in self._names(model, file).items():
            left.pop(theirs, None)
            found[own] = undo(self._weight(file, theirs), theirs, self.config)
        if left:
            raise UnsupportedError(
                f"{self.source.file}: nothing reads {len(left)} of its tensors, {next(iter(left))} among "
                "them, so the model would not be the one in the file; give the folder that it was made from"
            )
        self._note_kept(found)
        return found

    def _check_config(self, file: GgufFile) -> None:
        for key, name in _MEANT.items():
            said = file.keys.get(f"{file.architecture}.{key}")
            if said is not None and said != _said(self.config, name):
                raise UnsupportedError(
                    f"{self.source.file}: {file.architecture}.{key} is {said}, where "
                    f"transformers' {type(self.config).__name__} has {name} {_said(self.config, name)}; give "
                    "the folder that it was made from"
                )

    def _names(self, model: nn.Module, file: GgufFile) -> dict[str, str]:
        """Names of the model's parameters that the file has, with the names there."""
        gguf = package()
        (kind,) = (k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
        known = gguf.get_tensor_name_map(kind, self.config.num_hidden_layers)
        found = {}
        for own, _ in model.named_parameters(remove_duplicate=False):
            stem, _, ending = own.rpartition(".")
            theirs = known.get_name(stem)
            if theirs is not None and f"{theirs}.{ending}" in file.tensors:
                found[own] = f"{theirs}.{ending}"
        return found

    def _weight(self, file: GgufFile, name: str) -> Weight:
        entry = file.tensors[name]
        scheme = KEPT.get(entry.kind)
        if scheme is not None and len(entry.shape) == 2:
            return self._kept(file, name, scheme)

        def load() -> Tensor:
            gguf = package()
            kind = gguf.GGMLQuantizationType(entry.kind)
            try:
                values = gguf.dequantize(self._shaped(file, name), kind)
            except NotImplementedError as error:
                raise UnsupportedError(
                    f"{self.source.file}: the gguf package cannot unpack the type {kind.name} of {name}"
                ) from error
            plain = torch.from_numpy(values.astype("float32", copy=True)).reshape(entry.shape)
            return _finite(self.source.file, name, plain)

        return Weight(entry.shape, torch.float32, load)

    def _shaped(self, file: GgufFile, name: str) -> Any:
        """The bytes of a tensor as the package takes them: of floats the numbers, of blocks rows of bytes."""
        gguf = package()
        entry = file.tensors[name]
        kind = gguf.GGMLQuantizationType(entry.kind)
        plain = {"F32": "<f4", "F16": "<f2"}.get(kind.name)
        if plain is not None:
            return file.data(name).view(plain).reshape(entry.shape)
        return file.data(name).reshape(*entry.shape[:-1], -1)

    def _kept(self, file: GgufFile, name: str, scheme: Scheme) -> Weight:
        rows, width = file.tensors[name].shape
        wanted = scheme.pieces((rows, width))

        def compute() -> list[Tensor]:
            found = pieces_of(scheme, torch.from_numpy(file.data(name).copy()).view(rows, -1))
            for piece in found.values():
                if piece.is_floating_point():
                    _finite(self.source.file, name, piece)
            return [found[label].contiguous() for label in wanted]

        parts = derive([(shape, DTYPES[kind]) for shape, kind in wanted.values()], compute)
        return StoredWeight.holding(scheme, (rows, width), dict(zip(wanted, parts, strict=True)))

    def _note_kept(self, found: Mapping[str, Weight]) -> None:
        matrices = [weight for weight in found.values() if len(weight.shape) == 2]
        kept = sum(isinstance(weight, StoredWeight) for weight in matrices)
        self.notes.append(
            f"read from a GGUF: {kept} of its {len(matrices)} matrices have codes that a scheme holds (Q4_0, "
            "Q8_0, Q2_K to Q6_K); the others are unpacked"
        )


def _said(config: Any, name: str) -> Any:
    found = getattr(config, name, None)
    if found is None and name == "head_dim":
        return config.hidden_size // config.num_attention_heads
    return found


def _config(file: GgufFile) -> dict[str, Any]:
    """Fields of the config. Raises ModelError for sizes that no model has."""
    found: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in file.tensors}
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ModelError(
            f"{file.path} holds no embedding (token_embd.weight): it is of no language model"
        )
    found["vocab_size"] = table.shape[0]
    for key, name in (_SIZES | _FLOATS).items():
        value = file.keys.get(f"{file.architecture}.{key}")
        if value is None:
            continue
        if name in _SIZES.values() and not (isinstance(value, int) and 0 < value <= _LARGEST):
            raise ModelError(
                f"{file.path}: {file.architecture}.{key} is {value!r}, which is no size"
            )
        found[name] = value
    if found.get("num_hidden_layers", 0) > len(file.tensors):
        raise ModelError(
            f"{file.path} says that it has {found['num_hidden_layers']:,} layers, and holds "
            f"{len(file.tensors)} tensors: it is cut off or damaged"
        )
    if file.architecture == "llama" and "head_dim" not in found:
        found["head_dim"] = file.keys.get("llama.rope.dimension_count")
    if file.architecture.startswith("gemma"):
        # as llama.cpp has it: only the models of 27B divide scores by another root than that of a head
        whole = found.get("num_hidden_layers") in (46, 62) and found.get("num_attention_heads")
        shared = found.get("hidden_size", 0) // found["num_attention_heads"] if whole else None
        found["query_pre_attn_scalar"] = shared or found.get("head_dim", 256)
    for key, name in _TOKENS.items():
        found[name] = file.keys.get(f"tokenizer.ggml.{key}_token_id")
    return found


def _finite(file: Any, name: str, values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ModelError(f"{file}: {name} holds numbers that are not finite; the file is damaged")
    return values
