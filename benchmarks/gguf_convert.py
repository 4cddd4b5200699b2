"""Hugging Face folder to GGUF in Q4_0, with the output head in Q8_0.

Run in the peers' environment: `python -m benchmarks.gguf_convert FOLDER FILE THREADS`. Knows the two
architectures of the benchmark. The file has no tokenizer: the benchmark speaks in token ids.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as ll
import numpy as np
import torch

from .gguf_tensors import tensors

_ARCHITECTURES = {"qwen2": gguf.MODEL_ARCH.QWEN2, "llama": gguf.MODEL_ARCH.LLAMA}


def write_f16(folder: Path, file: Path) -> None:
    """Writes matrices as float16 and vectors as float32."""
    config = json.loads((folder / "config.json").read_text())
    arch = _ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, value in tensors(folder, arch):
        writer.add_tensor(name, _array(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path, threads: int) -> None:
    """Q4_0, and Q8_0 for the embedding, which is the head too."""
    parameters = ll.llama_model_quantize_default_params()
    parameters.nthread = threads
    parameters.ftype = ll.LLAMA_FTYPE_MOSTLY_Q4_0
    parameters.token_embedding_type = parameters.output_tensor_type = ll.GGML_TYPE_Q8_0
    code = ll.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters)
    )
    if code:
        raise RuntimeError(f"llama_model_quantize failed with code {code}")


def _array(value: torch.Tensor) -> np.ndarray[Any, Any]:
    kind = torch.float16 if value.ndim > 1 else torch.float32
    array: np.ndarray[Any, Any] = value.to(kind).contiguous().numpy()
    return array


def main() -> None:
    folder, target, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    half = target.with_suffix(".f16")
    write_f16(folder, half)
    quantize(half, target, threads)
    half.unlink()


if __name__ == "__main__":
    main()
