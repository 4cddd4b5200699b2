"""einfold's caches for transformers: `model.generate(past_key_values=einfold.cache_for(model, ..))`.

The model runs as it is; only its attention goes through the cache. Each layer has a program of its own, made
by the passes that a compile runs, and steps through the runtime's `Cache`, so every layout works here
that the reference engine can run. A layer is compressed as soon as it has read the prompt, before the next
layer reads it.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache

from .api import Method, resolve_recipe
from .compiler.driver import plan_cache, wrap_model
from .compiler.ir.cache.layout import CacheLayout
from .compiler.ir.program import Program
from .compiler.layer_program import layer_programs
from .compiler.recipe import Recipe
from .errors import IRError, UnsupportedError
from .huggingface_attention import Carried, install, register, uninstall
from .huggingface_layer import Layer

_ALONE = (
    "through transformers each layer must keep its own cache, so leave `share` out; models whose layers "
    "share keys and values of their own can only be compiled"
)


def cache_for(
    model: Any,
    recipe: str | Path | Recipe | dict[str, Any] | None = None,
    *,
    cache: str | None = None,
    prune: Method = None,
    quant: Method = None,
    share: Method = None,
    context: int | None = None,
    tokenizer: Any = None,
) -> EinfoldCache:
    """A cache for `model.generate(.., past_key_values=cache)`, laid out as `einfold.compile` would.

    The options are those of `einfold.compile`; of a recipe `[cache]`, `[calibration]` and `context` count.
    `context` is the most tokens of a row, prompt and answer; methods that calibrate read their text with
    `tokenizer`, or random tokens without one. Memory is taken by the first forward pass, which must hold the
    whole prompt: it is what methods with `prefill=exact` compress. It grows with the text, in steps.

    The call installs an attention function on the model; `cache.release()`, or leaving a `with` block,
    brings the former one back. `cache.reset()` empties the cache for the next prompt. Raises RecipeError
    and the errors of compiling, UnsupportedError for a model whose attention einfold cannot follow.
    """
    chosen = resolve_recipe(
        recipe,
        cache=cache,
        prune=prune,
        quant=quant,
        share=share,
        context=context,
        target="reference",  # which runs every layout
        portable=False,
        cubins=(),
    )
    return EinfoldCache(model, plan_cache(wrap_model(model, tokenizer), chosen))


class EinfoldCache(TransformersCache):  # type: ignore[misc]
    """A transformers cache whose layers are laid out by einfold; make it with `cache_for`."""

    def __init__(self, model: Any, planned: Program) -> None:
        assert planned.layout is not None
        for layer, _, group in planned.layout.groups():
            if group.owner is not None:
                raise UnsupportedError(
                    f"layer {layer.layer} reads the cache of layer {group.owner}; {_ALONE}"
                )
            try:
                CacheLayout((layer,)).bytes(1, 1)
            except IRError as error:
                raise UnsupportedError(f"{error}; {_ALONE}") from error
        self.layout = planned.layout
        programs = layer_programs(planned)
        if sorted(programs) != list(range(len(programs))):
            raise UnsupportedError(
                f"the model has attention in layers {sorted(programs)} only; "
                "through transformers every layer must have it"
            )
        super().__init__(layers=[Layer(programs[layer], layer) for layer in sorted(programs)])
        self.handle = register(self)
        self._model: weakref.ref[Any] | None = weakref.ref(model)
        install(model)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Any, Tensor]:
        """Hands the new keys and values on to the attention function, which writes and reads the cache."""
        return Carried(key_states, self.handle, layer_idx), value_states

    def release(self) -> None:
        """Gives the model back the attention function that it had; the cache is of no use afterwards."""
        model = self._model() if self._model is not None else None
        self._model = None
        if model is not None:
            uninstall(model)

    def __enter__(self) -> EinfoldCache:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    @property
    def capacity(self) -> int:
        """Tokens of a row that memory is held for; it grows with the text, up to the context."""
        return max(0 if layer.cache is None else layer.cache.capacity for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that are held now: `layout.bytes(rows, capacity)`."""
        return sum(layer.cache.nbytes for layer in self.layers if layer.cache is not None)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.layers:
            layer.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self.layers:
            if layer.cache is not None:
                layer.select(torch.arange(layer.cache.batch).repeat_interleave(repeats))
