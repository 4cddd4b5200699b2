"""Attention without a cache, as captured, and with one, as `attach_cache` makes it."""

from __future__ import annotations

import torch
from torch import Tensor

from .rotary import rotary_reference


def masked_attention(
    q_BSHD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    visible_BST: Tensor,
    sinks_H: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """softmax(cap(scale * q k^T)) v over the visible keys, grouped heads, gives [B, S, H, D].

    `softcap` c > 0 caps a logit as c * tanh(x / c) (Gemma 2, section 2). `sinks` holds a learned logit
    a head that takes part in the softmax and has no value (GPT-OSS). A query that sees no key at all
    and has no sink gives zeros.
    """
    batch, new, heads, _ = q_BSHD.shape
    kv_heads, total = k_BKTD.shape[1], k_BKTD.shape[2]
    group = heads // kv_heads
    q = q_BSHD.transpose(1, 2).reshape(batch, kv_heads, group * new, -1)
    logits = (q @ k_BKTD.transpose(2, 3)).reshape(batch, kv_heads, group, new, total) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible_BST[:, None, None], float("-inf"))
    if sinks_H is not None:
        sink = sinks_H.reshape(1, kv_heads, group, 1, 1).expand(batch, -1, -1, new, 1)
        weights = torch.softmax(torch.cat((logits, sink), dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(logits, dim=-1)
    weights = torch.nan_to_num(weights)
    out = weights.reshape(batch, kv_heads, group * new, total) @ v_BKTD
    return out.reshape(batch, heads, new, -1).transpose(1, 2).contiguous()


@torch.library.custom_op("einfold::attention", mutates_args=())
def attention(
    q_BSHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    sinks_H: Tensor | None,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Causal self-attention over the tokens of this call; `layer` names the cache it will get.

    `window` w > 0 lets query i see keys i-w+1 .. i (the newest w, itself included); 0 is no window.
    """
    new = q_BSHD.shape[1]
    position = torch.arange(new, device=q_BSHD.device)
    visible = position[None, :] <= position[:, None]
    if window:
        visible &= position[:, None] - position[None, :] < window
    return masked_attention(
        q_BSHD,
        k_BSKD.transpose(1, 2),
        v_BSKD.transpose(1, 2),
        visible[None].expand(q_BSHD.shape[0], -1, -1),
        sinks_H,
        scale,
        softcap,
    )


@attention.register_fake
def _(
    q_BSHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    sinks_H: Tensor | None,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    return q_BSHD.new_empty((*q_BSHD.shape[:-1], v_BSKD.shape[-1]))


@torch.library.custom_op("einfold::cached_attention", mutates_args=())
def cached_attention(
    q_BSHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    key_cache_BKCD: Tensor,
    value_cache_BKCD: Tensor,
    lengths_B: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of S new tokens over a cache that holds `lengths[b]` tokens of row b.

    The new keys (rotated first, where tables are given) and values are written behind them; query s
    sees the cache up to index lengths[b] + s, so causality goes by cache index, never by position.
    `window` counts cache indices in the same way as `einfold::attention`.

    With scales the caches hold int8: x is stored as clamp(round(x / scale), -128, 127), and what is
    attended to, the new tokens too, is what is stored times its scale.

    Gives (out [B, S, H, D], key cache, value cache). A target may write the caches in place.
    """
    if cos_PR is not None and sin_PR is not None and positions_BS is not None:
        q_BSHD = rotary_reference(q_BSHD, positions_BS, cos_PR, sin_PR, interleaved)
        k_BSKD = rotary_reference(k_BSKD, positions_BS, cos_PR, sin_PR, interleaved)
    new, capacity = q_BSHD.shape[1], key_cache_BKCD.shape[2]
    slot_BS = lengths_B[:, None] + torch.arange(new, device=lengths_B.device)
    keys = _write(key_cache_BKCD, k_BSKD, slot_BS, key_scale_KD)
    values = _write(value_cache_BKCD, v_BSKD, slot_BS, value_scale_KD)
    index_C = torch.arange(capacity, device=lengths_B.device)
    visible_BSC = index_C <= slot_BS[:, :, None]
    if window:
        visible_BSC &= slot_BS[:, :, None] - index_C < window
    out = masked_attention(
        q_BSHD,
        _read(keys, key_scale_KD),
        _read(values, value_scale_KD),
        visible_BSC,
        sinks_H,
        scale,
        softcap,
    )
    return out, keys, values


def _read(cache_BKCD: Tensor, scale_KD: Tensor | None) -> Tensor:
    return cache_BKCD if scale_KD is None else cache_BKCD * scale_KD[:, None]


def _write(
    cache_BKCD: Tensor, new_BSKD: Tensor, slot_BS: Tensor, scale_KD: Tensor | None
) -> Tensor:
    slots = slot_BS[:, None, :, None].expand(-1, cache_BKCD.shape[1], -1, cache_BKCD.shape[3])
    if scale_KD is not None:
        new_BSKD = (new_BSKD / scale_KD).round().clamp(-128, 127)
    return cache_BKCD.scatter(2, slots, new_BSKD.transpose(1, 2).to(cache_BKCD.dtype))


@cached_attention.register_fake
def _(
    q_BSHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    key_cache_BKCD: Tensor,
    value_cache_BKCD: Tensor,
    lengths_B: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    out = q_BSHD.new_empty((*q_BSHD.shape[:-1], v_BSKD.shape[-1]))
    return out, torch.empty_like(key_cache_BKCD), torch.empty_like(value_cache_BKCD)
