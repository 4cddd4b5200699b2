"""Peers of benchmarks/streamed_weights.py, each in a process of its own, in the peers' environment:

    python -m benchmarks.streamed_peers llama.cpp FILE.gguf --tokens 8 --threads 2
    python -m benchmarks.streamed_peers accelerate FOLDER --tokens 4 --threads 2 --resident 0

llama.cpp maps the file, with its weights as they lie there (packed anew they would be a copy in memory).
accelerate runs the bfloat16 checkpoint with its layers on the disk, embedding and head in memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

PROMPT = 8


def llama_cpp(model: Path, threads: int) -> Callable[[list[int]], int]:
    """A step: from the tokens that are new to the one that follows."""
    import llama_cpp as ll
    import numpy as np

    silent = ll.llama_log_callback(lambda level, text, data: None)
    ll.llama_log_set(silent, ctypes.c_void_p(0))
    ll.llama_backend_init()
    options = ll.llama_model_default_params()
    options.n_gpu_layers, options.use_mmap, options.use_extra_bufts = 0, True, False
    loaded = ll.llama_model_load_from_file(str(model).encode(), options)
    made = ll.llama_context_default_params()
    made.n_ctx = made.n_batch = made.n_ubatch = 512
    made.n_threads = made.n_threads_batch = threads
    context = ll.llama_init_from_model(loaded, made)
    if not context:
        raise RuntimeError("llama.cpp makes no context")
    vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(loaded))

    def step(ids: list[int]) -> int:
        tokens = (ll.llama_token * len(ids))(*ids)
        if ll.llama_decode(context, ll.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        logits = ll.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    step.keep = silent  # type: ignore[attr-defined]  # C calls it
    return step


def accelerate(folder: Path, threads: int, resident: int) -> Callable[[list[int]], int]:
    """The same, with so many layers resident and the others on the disk."""
    import torch
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(threads)
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    places: dict[str, int | str] = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    for layer in range(config.num_hidden_layers):
        places[f"model.layers.{layer}"] = "cpu" if layer < resident else "disk"
    model = load_checkpoint_and_dispatch(
        model, str(folder), places, offload_folder=tempfile.mkdtemp(), dtype=torch.bfloat16
    )
    past = None

    def step(ids: list[int]) -> int:
        nonlocal past
        with torch.no_grad():
            found = model(
                torch.tensor([ids]), past_key_values=past, use_cache=True, logits_to_keep=1
            )
        past = found.past_key_values
        return int(found.logits[0, -1].argmax())

    return step


def read_bytes() -> int:
    """What this process has had read from the disk."""
    with open("/proc/self/io", encoding="ascii") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("read_bytes"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.streamed_peers", description=__doc__)
    parser.add_argument("engine", choices=("llama.cpp", "accelerate"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resident", type=int, default=0, help="layers that accelerate keeps")
    given = parser.parse_args()
    started = time.perf_counter()
    if given.engine == "accelerate":
        step = accelerate(given.model, given.threads, given.resident)
        versions: tuple[str, ...] = ("accelerate", "torch", "transformers")
    else:
        step, versions = llama_cpp(given.model, given.threads), ("llama-cpp-python",)
    loaded = time.perf_counter()
    token = step([5 + n % 100 for n in range(PROMPT)])
    prefilled, before = time.perf_counter(), read_bytes()
    for _ in range(given.tokens):
        token = step([token])
    seconds = time.perf_counter() - prefilled
    print(
        json.dumps(
            {
                "load_seconds": loaded - started,
                "prefill_seconds": prefilled - loaded,
                "decode_seconds": seconds / given.tokens,
                "fetched_a_step": (read_bytes() - before) / given.tokens,
                "versions": {name: metadata.version(name) for name in versions},
            }
        )
    )


if __name__ == "__main__":
    main()
