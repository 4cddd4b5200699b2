"""einfold's caches for transformers: `model.generate(past_key_values=einfold.cache_for(model, ..))`.

The model runs as it is; only its attention goes through the cache. Each layer has a program of its own, made
by the passes that a compile runs, and steps through the runtime's `Cache`, so every layout works here
that the reference engine can run. A layer is compressed as soon as it has read the prompt, before the next
layer reads it.
"""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .api import Method, resolve_recipe
from .compiler.driver import plan_cache, wrap_model
from .compiler.ir.cache.layout import Buffer, CacheLayout
from .compiler.ir.interpreter import Interpreter
from .compiler.ir.ops import IN_PLACE
from .compiler.ir.program import Program
from .compiler.ir.types import DTYPES
from .compiler.layer_program import layer_programs
from .compiler.recipe import Recipe
from .errors import IRError, PromptError, UnsupportedError
from .runtime.cache import Cache
from .runtime.engine import CHUNK

NAME = "einfold_cache"

_ALONE = (
    "through transformers each layer must keep its own cache, so leave `share` out; models whose layers "
    "share keys and values of their own can only be compiled"
)

_HANDLES = itertools.count()
_CACHES: weakref.WeakValueDictionary[int, EinfoldCache] = weakref.WeakValueDictionary()

#: For each model whose attention is einfold's: what it was before, and how many caches want it so.
_INSTALLED: weakref.WeakKeyDictionary[nn.Module, tuple[str, int]] = weakref.WeakKeyDictionary()


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
    whole prompt: it is what methods with `prefill=exact` compress.

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


class _Carried(NamedTuple):
    """New keys on their way from `EinfoldCache.update` to the attention function, which reads the rest."""

    keys_BKSD: Tensor
    handle: int
    layer: int

    @property
    def shape(self) -> Any:
        """What any other attention function asks for first."""
        raise UnsupportedError(
            "this einfold cache came to a model whose attention does not go through it; give it to the model "
            "that cache_for made it for, before release()"
        )


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """The cache of one layer: a program, and the runtime's cache once the batch is known."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, program: Program, layer: int) -> None:
        super().__init__()
        assert program.layout is not None
        self.layout: CacheLayout = program.layout
        self.capacity = program.model.context
        self.layer = layer
        self.seen = 0
        """Tokens of the batch so far, padding among them."""
        self.stored = 0
        """The most slots that any row uses."""
        self.cache: Cache | None = None
        self._interpreter = Interpreter(program, instead=IN_PLACE)

    def attend(
        self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, real_BS: Tensor | None, sinks_H: Any
    ) -> Tensor:
        """Puts new tokens behind those that the cache has seen and attends; [B, S, H, D].

        `real` tells tokens from padding, which the cache never sees: its queries get zeros.
        """
        new = q_BSHD.shape[1]
        if self.cache is None:
            self.cache = self._allocate(q_BSHD, new)
        cache = self.cache
        if len(q_BSHD) != cache.batch:
            raise PromptError(
                f"a batch of {len(q_BSHD)} does not go into a cache of {cache.batch} rows; reset() it first"
            )
        if real_BS is None or bool(real_BS.all()):
            out = self._run(cache, q_BSHD, k_BSKD, v_BSKD, sinks_H)
        else:
            out = (
                torch.zeros_like(q_BSHD[..., :1]).expand(*q_BSHD.shape[:3], v_BSKD.shape[3]).clone()
            )
            for row in range(cache.batch):
                at = real_BS[row].nonzero()[:, 0]
                if len(at):
                    q, k, v = (x[row : row + 1, at] for x in (q_BSHD, k_BSKD, v_BSKD))
                    out[row, at] = self._run(cache.row(row), q, k, v, sinks_H)[0]
        cache.settle()  # the first step is the prompt
        self.seen += new
        self._count()
        return out

    def _count(self) -> None:
        """Notes how full the cache is, in a plain number: compiled models read it."""
        if self.cache is None:
            self.stored = 0
        else:
            clocks = {self.layout.clock(group) for _, _, group in self.layout.groups()}
            self.stored = max(int(self.cache.counters[clock].max()) for clock in clocks)

    def _allocate(self, q_BSHD: Tensor, prompt: int) -> Cache:
        device = q_BSHD.device

        def make(spec: Buffer) -> Any:
            shape = [int(size) for size in spec.shape]
            return torch.zeros(shape, dtype=DTYPES[spec.dtype], device=device)

        return Cache.allocate(self.layout, len(q_BSHD), self.capacity, prompt, make)

    def _run(self, cache: Cache, q: Tensor, k: Tensor, v: Tensor, sinks_H: Any) -> Tensor:
        if int(cache.lengths.max()) + q.shape[1] > cache.capacity:
            raise PromptError(
                f"{int(cache.lengths.max()) + q.shape[1]} tokens do not fit the context of "
                f"{cache.capacity} that the cache was made for; give cache_for a larger context"
            )
        parts, start = [], 0
        while start < q.shape[1]:
            size = min(CHUNK, cache.step_limit(), q.shape[1] - start)
            cache.make_room(size)
            chosen = slice(start, start + size)
            inputs = {"q": q[:, chosen], "k": k[:, chosen], "v": v[:, chosen], **cache.buffers}
            if sinks_H is not None:
                inputs["sinks"] = sinks_H
            for name, counts in cache.counters.items():
                inputs[name] = torch.tensor(counts, device=q.device)
            found = self._interpreter.run(inputs)
            parts.append(found.pop("out"))
            observed: dict[str, Any] = {n: x for n, x in found.items() if n not in cache.buffers}
            cache.advance(size, observed)
            start += size
        return torch.cat(parts, dim=1)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.stored + query_length, self.seen - self.stored

    def get_max_length(self) -> int:
        return self.capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: memory is taken by the first step."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        raise UnsupportedError("a layer of an einfold cache is updated through the whole cache")

    def reset(self) -> None:
        self.cache, self.seen, self.stored = None, 0, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest tokens, given as a negative number; refused where tokens leave the slots.

        Of a row with padding in front these may be more than it has: then it is empty.
        """
        if tokens_to_remove > 0:
            raise UnsupportedError("crop takes the tokens to remove as a negative number")
        if self.layout.clocks():
            raise UnsupportedError(
                f"layer {self.layer}: crop cannot bring back tokens that left the cache; use a cache "
                "without prune and quant, or generate without assisted decoding"
            )
        if self.cache is not None and tokens_to_remove:
            np.maximum(self.cache.lengths + tokens_to_remove, 0, out=self.cache.lengths)
            self.seen = max(0, self.seen + tokens_to_remove)
            self._count()

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, in this order; a row may come several times."""
        if self.cache is not None:
            self.cache = self.cache.select(rows.cpu().numpy())


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
        super().__init__(layers=[_Layer(programs[layer], layer) for layer in sorted(programs)])
        self.handle = next(_HANDLES)
        _CACHES[self.handle] = self
        self._model: weakref.ref[Any] | None = weakref.ref(model)
        _install(model)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Any, Tensor]:
        """Hands the new keys and values on to the attention function, which writes and reads the cache."""
        return _Carried(key_states, self.handle, layer_idx), value_states

    def release(self) -> None:
        """Gives the model back the attention function that it had; the cache is of no use afterwards."""
        model = self._model() if self._model is not None else None
        self._model = None
        if model is not None:
            _uninstall(model)

    def __enter__(self) -> EinfoldCache:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that are held now."""
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


@torch.library.custom_op("einfold::through_cache", mutates_args=())
def through_cache(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    real_BS: Tensor | None,
    sinks_H: Tensor | None,
    handle: int,
    layer: int,
) -> Tensor:
    """Attention of new tokens through the cache with this handle; [B, S, H, D].

    The cache changes on the way, which no argument shows: a graph must call this once for each layer, in
    their order, as the results' dependence on each other makes it.
    """
    cache = _CACHES.get(handle)
    if cache is None:
        raise UnsupportedError("the einfold cache of this call is gone")
    q, k, v = (x.transpose(1, 2).float() for x in (q_BHSD, k_BKSD, v_BKSD))
    sinks = None if sinks_H is None else sinks_H.float()
    out: Tensor = cache.layers[layer].attend(q, k, v, real_BS, sinks)
    return out.to(q_BHSD.dtype).contiguous()


@through_cache.register_fake
def _(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    real_BS: Tensor | None,
    sinks_H: Tensor | None,
    handle: int,
    layer: int,
) -> Tensor:
    batch, heads, new, _ = q_BHSD.shape
    return q_BHSD.new_empty((batch, new, heads, v_BKSD.shape[3]))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Tensor,
    attention_mask: Tensor | None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What the model calls for attention; scale, window and softcap are those of the traced model."""
    if not isinstance(key, _Carried):
        raise UnsupportedError(
            "the model's attention goes through an einfold cache, but this call brings none; give it as "
            "past_key_values, or release() the cache first"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UnsupportedError(
            f"an einfold cache takes a mask [rows, tokens] of padding, not one of {attention_mask.dim()} "
            "dimensions: which tokens see each other is decided by the cache"
        )
    out = through_cache(query, key.keys_BKSD, value, attention_mask, s_aux, key.handle, key.layer)
    return out, None


def _padding(*_: Any, attention_mask: Tensor | None = None, q_length: int = 0, **__: Any) -> Any:
    """Which of the new tokens are real, [B, S]: all that the cache asks of a mask."""
    return None if attention_mask is None else attention_mask[:, -q_length:]


def _install(model: Any) -> None:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _padding)
    before, count = _INSTALLED.get(model, (model.config._attn_implementation, 0))
    _INSTALLED[model] = (before, count + 1)
    model.set_attn_implementation(NAME)


def _uninstall(model: Any) -> None:
    before, count = _INSTALLED[model]
    if count > 1:
        _INSTALLED[model] = (before, count - 1)
    else:
        del _INSTALLED[model]
        model.set_attn_implementation(before)
