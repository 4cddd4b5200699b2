"""einfold's caches for transformers: `model.generate(past_key_values=einfold.cache_for(model, ..))`.

The model runs as it is; only its attention goes through the cache. Each layer has a program of its own, made
by the passes that a compile runs, and steps through the runtime's `Cache`, so every layout works here
that the reference engine can run. A layer is compressed as soon as it has read the prompt, before the next
layer reads it.
"""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache

from .api import Method, resolve_recipe
from .compiler.ir.kv.layout import CacheLayout
from .compiler.recipe import Recipe
from .errors import UnsupportedError
from .huggingface_attention import Carried, install, register, uninstall
from .huggingface_layer import Layer
from .huggingface_plan import CachePlan, planned


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
    check: bool = True,
) -> EinfoldCache:
    """A cache for `model.generate(.., past_key_values=cache)`, laid out as `einfold.compile` would.

    The options are those of `einfold.compile`; of a recipe `[cache]`, `[calibration]` and `context` count.
    Keys and values are kept in float16 where the model computes in float16 or bfloat16, or where a method
    changes its answers anyway, in float32 otherwise; `cache="f32"`, "f16", "int8" or "int4" says how.

    `context` is the most tokens of a row, prompt and answer; methods that calibrate read their text with
    `tokenizer`, or random tokens without one. Memory is taken by the first forward pass, which must hold the
    whole prompt: it is what methods with `prefill=exact` compress. It grows with the text, in steps. `check`
    runs what was captured beside the model on a few tokens, and refuses a model that einfold did not follow.

    What is planned is kept in the user's cache folder and found again, in other processes too, for the same
    model, options and versions. A plan that was checked when it was made is not checked again.

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
    if "storage" not in chosen.cache.model_fields_set:
        chosen = _with_slots(model, chosen)
    return EinfoldCache(model, planned(model, tokenizer, chosen, check))


def _with_slots(model: Any, chosen: Recipe) -> Recipe:
    """The recipe with slots of float16 where that gives no other answers than the recipe does anyway."""
    cache = chosen.cache
    half = getattr(model, "dtype", torch.float32) in (torch.float16, torch.bfloat16)
    plain = cache.quant is None and cache.share is None
    if plain and (half or cache.prune is not None):
        cache = cache.model_copy(update={"storage": "f16"})
    return chosen.model_copy(update={"cache": cache})


class EinfoldCache(TransformersCache):  # type: ignore[misc]
    """A transformers cache whose layers are laid out by einfold; make it with `cache_for`."""

    def __init__(self, model: Any, plan: CachePlan) -> None:
        self.layout = plan.layout
        super().__init__(
            layers=[Layer(program, layer) for layer, program in enumerate(plan.layers)]
        )
        self._join()
        self.attach(model)

    def _join(self) -> None:
        self.handle = register(self)
        self._detach: weakref.finalize[Any, Any] | None = None

    def attach(self, model: Any) -> None:
        """Installs the attention function on a model, for a cache that was copied or read from a file.

        Copies need it only where no other cache of the model does: one installed function serves them all.
        Raises UnsupportedError for a model with another number of layers.
        """
        layers = model.config.get_text_config().num_hidden_layers
        if layers != len(self.layers):
            raise UnsupportedError(
                f"the cache has {len(self.layers)} layers and the model {layers}; give it to the model that "
                "cache_for made it for"
            )
        self.release()
        install(model)
        self._detach = weakref.finalize(self, _detached, weakref.ref(model))
        self._detach.atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> EinfoldCache:
        """An independent cache with the same tokens, for a prefix that several prompts share.

        It goes through the attention function that is installed already and does not keep it there.
        """
        made = copy.copy(self)
        made.layers = [copy.deepcopy(layer, memo) for layer in self.layers]
        return made

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["handle"], state["_detach"]
        state["layout"] = list(self.layout.lines())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        layout = CacheLayout.parse(state["layout"])
        assert layout is not None
        self.layout = layout
        self._join()

    def __copy__(self) -> EinfoldCache:
        made: EinfoldCache = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        made.layers = list(self.layers)
        made._join()
        return made

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Any, Tensor]:
        """Hands the new keys and values on to the attention function, which writes and reads the cache."""
        return Carried(key_states, self.handle, layer_idx), value_states

    def release(self) -> None:
        """Gives the model back the attention function that it had; the cache is of no use afterwards.

        A cache that is let go of does so by itself.
        """
        if self._detach is not None:
            self._detach()

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


def _detached(model: weakref.ref[Any]) -> None:
    found = model()
    if found is not None:
        uninstall(found)
