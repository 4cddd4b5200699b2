"""onnxruntime-genai on what its own model builder made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime_genai as og

from .serve import Engine, serve

PACKAGES = ("onnxruntime-genai", "onnxruntime")

#: Tokens of a prefill that are run at once: attention scores of 16,384 by 16,384 tokens would take 34 GB.
PIECE = 512


class GenAIEngine(Engine):
    """Options: `embedding_apart` where a float32 embedding lies beside the head: no step reads it."""

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        config = og.Config(model)
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = og.Model(config)
        described = json.loads(Path(model, "genai_config.json").read_text())["model"]
        decoder = described["decoder"]
        self.weight_bytes = Path(model, f"{decoder['filename']}.data").stat().st_size
        if options.get("embedding_apart"):
            self.weight_bytes -= 4 * described["vocab_size"] * decoder["hidden_size"]
        per_layer = 2 * decoder["num_key_value_heads"] * decoder["head_size"] * 4
        self.cache_bytes = decoder["num_hidden_layers"] * per_layer
        self._generators: dict[int, Any] = {}
        self._generator: Any = None

    def prefill(self, ids: list[int]) -> None:
        self._new(len(ids) + 1).append_tokens(ids)

    def fill(self, context: int, room: int) -> None:
        """By a real prefill, in pieces for the memory's sake: the cache can't be set from outside."""
        generator = self._new(context + room + 1)
        for first in range(0, context, PIECE):
            last = min(first + PIECE, context)
            generator.append_tokens([i % 251 + 2 for i in range(first, last)])
        self._generators[context] = generator

    def rewind(self, context: int) -> None:
        self._generator = self._generators[context]
        self._generator.rewind_to(context)
        self._generator.append_tokens([5])
        self._generator.generate_next_token()  # reads the logits of what was appended, runs nothing

    def step(self) -> None:
        self._generator.generate_next_token()

    def _new(self, length: int) -> Any:
        params = og.GeneratorParams(self._model)
        # Greedy, and the end token is kept out: random weights may write it.
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        return og.Generator(self._model, params)


if __name__ == "__main__":
    serve(GenAIEngine, PACKAGES)
