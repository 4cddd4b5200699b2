"""What a cache learns from the queries of a step: how much attention tokens got.

A step shows the queries of the groups that choose by attention. They are attended with here once more,
over the keys in the slots, and the attention is added up for each token and KV head, over its query
heads. Padding behind a row's tokens neither pays nor gets attention.

Arrays may be NumPy's or torch's; sums are made in NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..compiler.ir.kv.attention_sums import fading_sums, host, like
from ..compiler.ir.kv.layout import HeadGroup, cache_name, query_name
from ..errors import EinfoldError
from .buffers import CacheBuffers


def observe(cache: CacheBuffers, sizes: npt.NDArray[np.int64], observed: Mapping[str, Any]) -> None:
    """Adds what the tokens of a step attended to, `sizes` of each row; they are not counted yet."""
    if not sizes.any():
        return
    for layer, index, group in cache.layout.groups():
        if not group.observed or group.owner is not None:
            continue
        if group.policy.once and cache.prompt is None:
            continue  # chosen already
        name, prefix = query_name(layer.layer, index), cache_name(layer.layer, index)
        if name not in observed:
            raise EinfoldError(f"the step gave no {name}, by which the cache chooses its tokens")
        used = cache.counters[cache.layout.clock(group)]
        for row in np.flatnonzero(sizes):
            q_SHD = observed[name][row][: int(sizes[row])]
            held = cache.row_of(layer.layer, index, int(row))
            group.policy.watch(held, q_SHD)
            if group.storage.balanced:
                _widen(cache.buffers[f"{prefix}.query_max"][row], q_SHD)
            if group.policy.told:
                _put(group, held, int(used[row]), q_SHD)
            elif group.scores:
                _add(group, held, int(used[row]), q_SHD)


def _widen(largest_KD: Any, q_SHD: Any) -> None:
    """Keeps the largest magnitude of each channel of a KV head's queries."""
    of_head_D = np.abs(host(q_SHD)).max(0)
    of_head_KD = of_head_D.reshape(len(largest_KD), -1, of_head_D.shape[-1]).max(1)
    largest_KD[:] = like(np.maximum(host(largest_KD), of_head_KD), largest_KD)


def _put(group: HeadGroup, held: Mapping[str, Any], used: int, told_SK1: Any) -> None:
    """Puts what trained heads said of new tokens beside them."""
    for name in group.scores:
        score_KN = held[name]
        score_KN[:, used : used + told_SK1.shape[0]] = like(host(told_SK1)[..., 0].T, score_KN)


def _add(group: HeadGroup, held: Mapping[str, Any], used: int, q_SHD: Any) -> None:
    """Adds the attention of new queries to each score, in which that of older ones has faded."""
    new = q_SHD.shape[0]
    keys_KTD = host(held["key"][:, : used + new])
    for name, sums_KT in fading_sums(host(q_SHD), keys_KTD, used, group.scores).items():
        score_KN, fading = held[name], group.scores[name].fading
        if fading != 1:
            score_KN *= fading**new
        score_KN[:, : used + new] += like(sums_KT, score_KN)
