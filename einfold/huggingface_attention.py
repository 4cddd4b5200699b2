"""What a model of transformers calls for attention while an einfold cache is installed on it."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .errors import UnsupportedError

NAME = "einfold_cache"


class Layered(Protocol):
    """A cache, as attention sees it: its layers attend (`huggingface_layer.Layer`)."""

    layers: list[Any]


_HANDLES = itertools.count()
_CACHES: weakref.WeakValueDictionary[int, Layered] = weakref.WeakValueDictionary()

#: For each model whose attention is einfold's: what it was before, and how many caches want it so.
_INSTALLED: weakref.WeakKeyDictionary[nn.Module, tuple[str, int]] = weakref.WeakKeyDictionary()


def register(cache: Layered) -> int:
    """A number by which a graph names this cache, for as long as it lives."""
    handle = next(_HANDLES)
    _CACHES[handle] = cache
    return handle


class Carried(NamedTuple):
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


@torch.library.custom_op("einfold::through_cache", mutates_args=())
def through_cache(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
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
    cache.layers[layer].check_new(q.shape[1], positions)
    out: Tensor = cache.layers[layer].attend(q, k, v, mask, sinks)
    return out.to(q_BHSD.dtype).contiguous()


@through_cache.register_fake
def _(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    sinks_H: Tensor | None,
    handle: int,
    layer: int,
) -> Tensor:
    batch, heads, new, _ = q_BHSD.shape
    return q_BHSD.new_empty((batch, new, heads, v_BKSD.shape[3]))


def _no_gradients(context: Any, *_: Any) -> None:
    raise UnsupportedError(
        "attention through an einfold cache gives no gradients: what is cached is not kept for a backward "
        "pass; run the model under torch.no_grad(), or train it without the cache"
    )


through_cache.register_autograd(_no_gradients)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Tensor,
    attention_mask: Tensor | None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What the model calls for attention; scale, window and softcap are those of the traced model."""
    if not isinstance(key, Carried):
        raise UnsupportedError(
            "the model's attention goes through an einfold cache, but this call brings none; give it as "
            "past_key_values, or release() the cache first"
        )
    new = (query, key.keys_BKSD, value, attention_mask, position_ids, s_aux)
    return through_cache(*new, key.handle, key.layer), None


def _mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Any:
    """The mask as it was given: the cache itself knows what is causal, and each layer its window."""
    return attention_mask


def install(model: Any) -> None:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    before, count = _INSTALLED.get(model, (model.config._attn_implementation, 0))
    _INSTALLED[model] = (before, count + 1)
    model.set_attn_implementation(NAME)


def uninstall(model: Any) -> None:
    before, count = _INSTALLED[model]
    if count > 1:
        _INSTALLED[model] = (before, count - 1)
    else:
        del _INSTALLED[model]
        model.set_attn_implementation(before)
