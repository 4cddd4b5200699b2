"""The tensors of a Hugging Face folder by llama.cpp's names and in its order. Needs gguf and torch alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from safetensors import safe_open


def tensors(folder: Path, arch: gguf.MODEL_ARCH) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values. Raises ValueError for a tensor that llama.cpp has no name for."""
    config = json.loads((folder / "config.json").read_text())
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as found:
            for key in found.keys():  # noqa: SIM118 - it has no iterator
                name = names.get_name(key, try_suffixes=(".weight", ".bias"))
                if name is None:
                    raise ValueError(f"llama.cpp has no name for {key}")
                value = found.get_tensor(key)
                if arch == gguf.MODEL_ARCH.LLAMA and key.endswith(
                    ("q_proj.weight", "k_proj.weight")
                ):
                    value = _interleaved(value, heads if "q_proj" in key else shared)
                yield name, value


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring rows of a llama's Q and K, transformers rows half a head apart."""
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)
