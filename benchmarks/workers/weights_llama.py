"""A model's weights in formats of llama.cpp, by an importance matrix. Runs in the peers' environment.

python weights_llama.py FOLDER TOKENIZER TEXT TOOLS OUT TYPE ..

FOLDER is a Llama of Hugging Face; TOKENIZER a GGUF with its tokenizer; TEXT what the importance matrix is
made of; TOOLS the folder of llama-imatrix and llama-quantize. Writes OUT/TYPE.gguf for each type.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import torch
from safetensors import safe_open


def write(folder: Path, tokenizer: Path, file: Path) -> None:
    """The weights in float32 under all that another file of the same model says."""
    config = json.loads((folder / "config.json").read_text())
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    reader = gguf.GGUFReader(tokenizer)
    writer = gguf.GGUFWriter(file, "llama")
    for field in reader.fields.values():
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        if not field.name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            writer.add_key_value(field.name, field.contents(), kind, inner)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - it has no iterator
            value = tensors.get_tensor(key)
            if key.endswith(("q_proj.weight", "k_proj.weight")):
                value = interleaved(value, heads if "q_proj" in key else shared)
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(name, value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring rows of Q and K, transformers rows half a head apart."""
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def main() -> None:
    folder, tokenizer, text, tools, out = map(Path, sys.argv[1:6])
    out.mkdir(parents=True, exist_ok=True)
    plain, matrix = out / "f32.gguf", out / "imatrix.gguf"
    write(folder, tokenizer, plain)
    run(tools / "llama-imatrix", "-m", plain, "-f", text, "-o", matrix, "-c", "512", "-ngl", "0")
    for kind in sys.argv[6:]:
        run(tools / "llama-quantize", "--imatrix", matrix, plain, out / f"{kind}.gguf", kind)
    plain.unlink()


def run(*command: Path | str) -> None:
    """Raises CalledProcessError where a tool fails."""
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    main()
