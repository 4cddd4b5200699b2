"""Tiny GGUF files, written by the gguf package with what llama.cpp's converter does to weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ... import models

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

#: Sizes by the keys of the header; those of `models.CONFIGS` that a reader cannot know otherwise.
_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}


def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp rotates them: the halves of a head become neighbours."""
    first, second = rows.unflatten(0, (heads, 2, -1)).unbind(1)
    return torch.stack((first, second), 2).flatten(0, 2)


def write(
    path: Path, name: str, kinds: Mapping[str, str], tokenizer: Path | None = None, **keys: Any
) -> Any:
    """Writes the model of a name of `models`; gives the model. `kinds` gives types by a part of the name of
    a matrix; others are F32. `keys` are further keys of the architecture, or sizes of the model."""
    sizes = {key: keys.pop(key) for key in ("hidden_size", "intermediate_size") if key in keys}
    model = models.build(name, **sizes)
    config, architecture = model.config, name
    writer = gguf.GGUFWriter(path, architecture)
    for key, own in _KEYS.items():
        writer.add_uint32(f"{architecture}.{key}", getattr(config, own))
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    if architecture != "gemma3":
        theta = config.rope_parameters["rope_theta"]
        writer.add_float32(f"{architecture}.rope.freq_base", theta)
    for key, value in keys.items():
        put = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        put(f"{architecture}.{key.replace('__', '.')}", value)
    (kind,) = (k for k, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for own, parameter in model.named_parameters():
        stem, _, ending = own.rpartition(".")
        theirs = f"{names.get_name(stem)}.{ending}"
        value = _converted(architecture, theirs, parameter.detach(), config)
        given = next((k for part, k in kinds.items() if part in theirs), "F32")
        of_type = gguf.GGMLQuantizationType[given if value.ndim > 1 else "F32"]
        writer.add_tensor(theirs, _blocks(value, of_type), raw_dtype=of_type)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _blocks(value: torch.Tensor, kind: Any) -> np.ndarray[Any, Any]:
    """A tensor in blocks of a type; for one that the package does not write, blocks that stand for numbers of
    about its size, of any codes."""
    try:
        found: np.ndarray[Any, Any] = gguf.quantize(value.numpy(), kind)
        return found
    except NotImplementedError:
        pass
    count, size = gguf.GGML_QUANT_SIZES[kind]
    rows, width = value.shape
    random = np.random.default_rng(rows)
    blocks = random.integers(0, 256, (rows, width // count, size), dtype=np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    small = np.array([2e-4], np.float16).view(np.uint8)
    for at in places[kind.name]:
        blocks[..., at : at + 2] = small
    return blocks.reshape(rows, -1)


def _converted(architecture: str, name: str, value: torch.Tensor, config: Any) -> torch.Tensor:
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return value + 1
    if architecture == "llama" and ".attn_q." in name:
        return permuted(value, config.num_attention_heads)
    if architecture == "llama" and ".attn_k." in name:
        return permuted(value, config.num_key_value_heads)
    return value


def _add_tokenizer(writer: Any, folder: Path) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocabulary: dict[str, int] = raw["model"]["vocab"]
    special = {entry["content"] for entry in raw["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in special else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in raw["model"]["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    template = folder / "chat_template.jinja"
    writer.add_chat_template(
        template.read_text("utf-8") if template.is_file() else settings["chat_template"]
    )


def cut(path: Path, size: int, out: Path) -> Path:
    """The first bytes of a file."""
    out.write_bytes(path.read_bytes()[:size])
    return out


def changed(path: Path, at: int, value: Any, out: Path) -> Path:
    """A file with a number in its place."""
    data = bytearray(path.read_bytes())
    data[at : at + np.asarray(value).nbytes] = np.asarray(value).tobytes()
    out.write_bytes(bytes(data))
    return out
