"""A model's weights in formats of llama.cpp, by an importance matrix. Runs in the peers' environment.

python -m benchmarks.workers.weights_llama FOLDER TOKENIZER TEXT TOOLS OUT TYPE ..

FOLDER is a Llama of Hugging Face; TOKENIZER a GGUF with its tokenizer; TEXT what the importance matrix is
made of; TOOLS the folder of llama-imatrix and llama-quantize. Writes OUT/TYPE.gguf for each type.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf

from ..gguf_tensors import tensors


def write(folder: Path, tokenizer: Path, file: Path) -> None:
    """The weights in float32 under all that another file of the same model says."""
    reader = gguf.GGUFReader(tokenizer)
    writer = gguf.GGUFWriter(file, "llama")
    for field in reader.fields.values():
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        if not field.name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            writer.add_key_value(field.name, field.contents(), kind, inner)
    for name, value in tensors(folder, gguf.MODEL_ARCH.LLAMA):
        writer.add_tensor(name, value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
