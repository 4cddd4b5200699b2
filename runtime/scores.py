"""How much attention tokens get: kept for groups whose policy or storage asks for it, in torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compiler.ir.cache.layout import cache_name, query_name
from ..compiler.ir.kv.salient import attention_scores

if TYPE_CHECKING:
    from .cache import Cache, Counts


def observe(cache: Cache, sizes: Counts, observed: Mapping[str, Any]) -> None:
    """Adds a step's attention to the scores; its `sizes` tokens a row are in slots, not counted yet.

    A step without queries, as in a run that only moves counters, adds nothing.
    """
    for layer, index, group in cache.layout.groups():
        queries = observed.get(query_name(layer.layer, index))
        if not group.scored or queries is None:
            continue
        prefix = cache_name(layer.layer, index)
        q_BSHD = _tensor(queries)
        used = torch.from_numpy(cache.counters[cache.layout.clock(group)])
        real = torch.from_numpy(sizes.copy())
        score_BKC = _tensor(cache.buffers[f"{prefix}.score"])
        keys_BKCD = _tensor(cache.buffers[f"{prefix}.key"])
        score_BKC += attention_scores(q_BSHD, keys_BKCD, used, real)
        if group.storage.balanced:
            largest_BKD = _tensor(cache.buffers[f"{prefix}.query_max"])
            padding = torch.arange(q_BSHD.shape[1]) >= real[:, None]
            magnitudes = q_BSHD.abs().masked_fill(padding[:, :, None, None].to(q_BSHD.device), 0.0)
            of_head = magnitudes.amax(1).unflatten(1, (largest_BKD.shape[1], -1)).amax(2)
            torch.maximum(largest_BKD, of_head, out=largest_BKD)


def _tensor(array: Any) -> Tensor:
    return array if isinstance(array, Tensor) else torch.from_numpy(array)
