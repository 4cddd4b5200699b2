"""Hugging Face transformers, as it comes or compiled by inductor over a static cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from .serve import Engine, serve

PACKAGES = ("torch", "transformers")

#: Slots of the static cache: room for a prompt of 512 and for decoding at 128. One size, because
#: each other one would be compiled anew.
STATIC_SLOTS = 640


class HuggingFaceEngine(Engine):
    """Options: `dtype`; `compile` for inductor with frozen weights."""

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._dtype = getattr(torch, options["dtype"])
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=self._dtype).eval()
        config = self._model.config
        self._layers = config.num_hidden_layers
        self._heads = config.num_key_value_heads
        self._size = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self.weight_bytes = sum(p.nbytes for p in self._model.parameters())
        self.cache_bytes = 2 * self._layers * self._heads * self._size * self._dtype.itemsize
        self._run: Any = self._model
        self._static: Any = None
        if options.get("compile"):
            import torch._inductor.config as inductor

            inductor.freezing = True
            self._run = torch.compile(self._model, dynamic=False)
            self._static = self._static_cache()
        self._filled: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._cache: Any = None
        self._position = 0
        self._token = torch.ones((1, 1), dtype=torch.long)

    def prefill(self, ids: list[int]) -> None:
        self._cache = self._empty()
        self._position = 0
        self._forward(torch.tensor([ids]))

    def fill(self, context: int, room: int) -> None:
        """Random numbers, as for einfold."""
        if self._static is not None:
            assert context + room <= STATIC_SLOTS, f"the static cache has {STATIC_SLOTS} slots"
            for layer in self._static.layers:
                layer.keys.normal_()
                layer.values.normal_()
        else:
            shape = (1, self._heads, context, self._size)
            self._filled[context] = [
                (torch.randn(shape, dtype=self._dtype), torch.randn(shape, dtype=self._dtype))
                for _ in range(self._layers)
            ]

    def rewind(self, context: int) -> None:
        self._cache = self._empty(context)
        if self._static is None:
            for index, (keys, values) in enumerate(self._filled[context]):
                self._cache.update(keys, values, index)
        self._position = context

    def step(self) -> None:
        self._token = self._forward(self._token).argmax(-1)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        end = self._position + ids.shape[1]
        positions = torch.arange(self._position, end)[None]
        self._position = end
        out = self._run(
            input_ids=ids,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = out.logits
        return logits

    def _empty(self, length: int = 0) -> Any:
        if self._static is None:
            return DynamicCache()
        for layer in self._static.layers:
            layer.cumulative_length.fill_(length)
        return self._static

    def _static_cache(self) -> Any:
        cache = StaticCache(config=self._model.config, max_cache_len=STATIC_SLOTS)
        cache.early_initialization(1, self._heads, self._size, self._dtype, torch.device("cpu"))
        return cache


if __name__ == "__main__":
    serve(HuggingFaceEngine, PACKAGES)
