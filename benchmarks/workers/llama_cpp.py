"""llama.cpp through the functions of llama-cpp-python that map its C API one to one."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp as ll
import numpy as np

from .llama_state import tile_state
from .serve import Engine, serve

PACKAGES = ("llama-cpp-python",)

#: Tokens that are really run to fill a cache; the rest of it repeats them.
SEED = 256

CACHE_TYPES = {"f16": (ll.GGML_TYPE_F16, 2.0), "q8_0": (ll.GGML_TYPE_Q8_0, 34 / 32)}

_silent = ll.llama_log_callback(lambda level, text, data: None)


class LlamaCppEngine(Engine):
    """Options: `cache`, the type of the KV cache. Flash attention is on, as its quantized V needs."""

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        ll.llama_log_set(_silent, ctypes.c_void_p(0))
        ll.llama_backend_init()
        parameters = ll.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = ll.llama_model_load_from_file(model.encode(), parameters)
        if not self._model:
            raise RuntimeError("llama.cpp does not load the file")
        self._threads = threads
        self._type, element = CACHE_TYPES[options["cache"]]
        self._vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self._model))
        heads, layers = ll.llama_model_n_head_kv(self._model), ll.llama_model_n_layer(self._model)
        size = ll.llama_model_n_embd(self._model) // ll.llama_model_n_head(self._model)
        self.weight_bytes = ll.llama_model_size(self._model)
        self.cache_bytes = 2 * layers * heads * size * element
        self._contexts: dict[int, Any] = {}
        self._prompt = self._new(1024)
        self._context: Any = None
        self._token = 5

    def prefill(self, ids: list[int]) -> None:
        self._clear(self._prompt)
        self._decode(self._prompt, ids)

    def fill(self, context: int, room: int) -> None:
        """A short real text, whose cache is then repeated through the file format of saved states."""
        made = self._new(context + room)
        seed = min(SEED, context)
        self._decode(made, [i % 251 + 2 for i in range(seed)])
        if seed < context:
            size = ll.llama_state_seq_get_size(made, 0)
            saved = (ctypes.c_uint8 * size)()
            ll.llama_state_seq_get_data(made, saved, size, 0)
            tiled = tile_state(bytes(saved), seed, context)
            self._clear(made)
            data = (ctypes.c_uint8 * len(tiled)).from_buffer(tiled)
            if not ll.llama_state_seq_set_data(made, data, len(tiled), 0):
                raise RuntimeError("llama.cpp refuses the filled cache: its format has changed")
        held = ll.llama_memory_seq_pos_max(ll.llama_get_memory(made), 0) + 1
        if held != context:
            raise RuntimeError(f"the cache holds {held} tokens instead of {context}")
        self._contexts[context] = made

    def rewind(self, context: int) -> None:
        self._context = self._contexts[context]
        ll.llama_memory_seq_rm(ll.llama_get_memory(self._context), 0, context, -1)

    def step(self) -> None:
        self._decode(self._context, [self._token])
        logits = ll.llama_get_logits_ith(self._context, -1)
        self._token = int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())

    def _decode(self, context: Any, ids: list[int]) -> None:
        tokens = (ll.llama_token * len(ids))(*ids)
        if ll.llama_decode(context, ll.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")

    def _clear(self, context: Any) -> None:
        ll.llama_memory_clear(ll.llama_get_memory(context), True)

    def _new(self, slots: int) -> Any:
        parameters = ll.llama_context_default_params()
        parameters.n_ctx = slots
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.type_k = parameters.type_v = self._type
        parameters.flash_attn_type = 1
        context = ll.llama_init_from_model(self._model, parameters)
        if not context:
            raise RuntimeError("llama.cpp makes no context")
        return context


if __name__ == "__main__":
    serve(LlamaCppEngine, PACKAGES)
