"""Attention of a layer that has no cache of its own and reads another layer's."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import (
    compensation_bias,
    masked_attention,
    new_slots,
    stored,
    visible_slots,
)
from .rotary import turned


@torch.library.custom_op("einfold::shared_attention", mutates_args=())
def shared_attention(
    q_BSHD: Tensor,
    key_cache_BKCD: Tensor,
    value_cache_BKCD: Tensor,
    used_B: Tensor,
    count_BK: Tensor | None,
    sinks_H: Tensor | None,
    positions_BS: Tensor | None,
    cos_PR: Tensor | None,
    sin_PR: Tensor | None,
    key_scale_KD: Tensor | None,
    value_scale_KD: Tensor | None,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
    interleaved: bool,
) -> Tensor:
    """Attention of S new tokens over the caches as another layer's `einfold::cached_attention` left them.

    So `used` counts the slots of before this step, as it does there: query s sees slots up to used[b] + s,
    of which the newest were written in this step. Only the queries are rotated. `count`, the scales and the
    rest mean what they mean there; nothing is written. Gives [B, S, H, D].
    """
    q_BSHD = turned(q_BSHD, positions_BS, cos_PR, sin_PR, interleaved)
    slots = key_cache_BKCD.shape[2]
    slot_BS = new_slots(used_B, q_BSHD.shape[1])
    return masked_attention(
        q_BSHD,
        stored(key_cache_BKCD, key_scale_KD).to(q_BSHD.dtype),
        stored(value_cache_BKCD, value_scale_KD).to(q_BSHD.dtype),
        visible_slots(slot_BS, slots, window, count_BK),
        sinks_H,
        scale,
        softcap,
        compensation_bias(count_BK, slots),
    )


@shared_attention.register_fake
def _(
    q_BSHD: Tensor,
    key_cache_BKCD: Tensor,
    value_cache_BKCD: Tensor,
    used_B: Tensor,
    count_BK: Tensor | None,
    sinks_H: Tensor | None,
    positions_BS: Tensor | None,
    cos_PR: Tensor | None,
    sin_PR: Tensor | None,
    key_scale_KD: Tensor | None,
    value_scale_KD: Tensor | None,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
    interleaved: bool,
) -> Tensor:
    return q_BSHD.new_empty((*q_BSHD.shape[:-1], value_cache_BKCD.shape[-1]))
