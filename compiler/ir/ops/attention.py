"""Attention without a cache, as captured, and with one, as `attach_cache` makes it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv.codes.affine import narrowed
from .rotary import Rotary, turned


def masked_attention(
    q_BSHD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    visible_BST: Tensor,
    sinks_H: Tensor | None,
    scale: float,
    softcap: float,
    bias_BKT: Tensor | None = None,
) -> Tensor:
    """softmax(cap(scale * q k^T) + bias) v over the visible keys, grouped heads, gives [B, S, H, D].

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
    if bias_BKT is not None:
        logits = logits + bias_BKT[:, :, None, None]
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of S new tokens over a cache of which row b uses `used[b]` slots.

    The new keys (rotated first, where tables are given) and values are written behind them; query s
    sees the cache up to slot used[b] + s, so causality goes by cache index, never by position.
    `window` counts slots in the same way as `einfold::attention`.

    With `count`, slot 0 of KV head h stands for count[b, h] tokens: log(count) is added to its logit, and
    a count of 0 hides it.

    Caches of float16 hold rounded numbers, cut to its largest; they are attended to in the queries' type.

    With scales the caches hold int8: x is stored as clamp(round(x / scale), -128, 127), and what is
    attended to, the new tokens too, is what is stored times its scale.

    Gives (out [B, S, H, D], key cache, value cache). A target may write the caches in place.
    """
    return cached_attention_in_place(
        q_BSHD,
        k_BSKD,
        v_BSKD,
        key_cache_BKCD.clone(),
        value_cache_BKCD.clone(),
        used_B,
        count_BK,
        sinks_H,
        positions_BS,
        cos_PR,
        sin_PR,
        key_scale_KD,
        value_scale_KD,
        layer,
        scale,
        window,
        softcap,
        interleaved,
    )


def cached_attention_in_place(
    q_BSHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
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
    shown_BSC: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`einfold::cached_attention` that writes the caches it is given and gives them back.

    `shown` says which slots each new token sees, in place of all in its window up to its own.
    """
    rotary = (positions_BS, cos_PR, sin_PR, interleaved)
    caches, scales = (key_cache_BKCD, value_cache_BKCD), (key_scale_KD, value_scale_KD)
    q_BSHD, slot_BS = take_in(q_BSHD, k_BSKD, v_BSKD, caches, used_B, rotary, scales)
    visible_BSC = shown_BSC
    if visible_BSC is None:
        visible_BSC = visible_slots(slot_BS, key_cache_BKCD.shape[2], window, count_BK)
    out = masked_attention(
        q_BSHD,
        stored(key_cache_BKCD, key_scale_KD).to(q_BSHD.dtype),
        stored(value_cache_BKCD, value_scale_KD).to(q_BSHD.dtype),
        visible_BSC,
        sinks_H,
        scale,
        softcap,
        compensation_bias(count_BK, key_cache_BKCD.shape[2]),
    )
    return out, key_cache_BKCD, value_cache_BKCD


def take_in(
    q_BSHD: Tensor,
    k_BSKD: Tensor | None,
    v_BSKD: Tensor | None,
    caches_BKCD: tuple[Tensor, Tensor],
    used_B: Tensor,
    rotary: Rotary,
    scales_KD: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """What a step over slots begins with: new tokens are rotated and written into their slots, in place.

    Gives the queries, rotated, and the slots [B, S]. Without k and v the slots hold the tokens already.
    """
    slot_BS = new_slots(used_B, q_BSHD.shape[1])
    if k_BSKD is not None and v_BSKD is not None:
        write_slots(caches_BKCD[0], turned(k_BSKD, *rotary), slot_BS, scales_KD[0])
        write_slots(caches_BKCD[1], v_BSKD, slot_BS, scales_KD[1])
    return turned(q_BSHD, *rotary), slot_BS


def new_slots(used_B: Tensor, new: int) -> Tensor:
    """The slots [B, S] that the new tokens take."""
    return used_B[:, None] + torch.arange(new, device=used_B.device)


def visible_slots(slot_BS: Tensor, slots: int, window: int, count_BK: Tensor | None) -> Tensor:
    """Which slots each new token sees, bool [B, S, C]; slot 0 only where it stands for something."""
    index_C = torch.arange(slots, device=slot_BS.device)
    visible_BSC = index_C <= slot_BS[:, :, None]
    if window:
        visible_BSC &= slot_BS[:, :, None] - index_C < window
    if count_BK is not None:
        visible_BSC &= (index_C > 0) | (count_BK[:, :1, None] > 0)
    return visible_BSC


def compensation_bias(count_BK: Tensor | None, slots: int) -> Tensor | None:
    """What is added to the logits of each slot, [B, K, C]: log(count) at slot 0."""
    if count_BK is None:
        return None
    index_C = torch.arange(slots, device=count_BK.device)
    log_BK = torch.log(count_BK.clamp(min=1))
    return torch.where(index_C == 0, log_BK[:, :, None], torch.zeros((), device=count_BK.device))


def stored(cache_BKCD: Tensor, scale_KD: Tensor | None) -> Tensor:
    """What the slots stand for."""
    return cache_BKCD if scale_KD is None else cache_BKCD * scale_KD[:, None]


def write_slots(
    cache_BKCD: Tensor, new_BSKD: Tensor, slot_BS: Tensor, scale_KD: Tensor | None
) -> None:
    """Writes new tokens into their slots, in place."""
    slots = slot_BS[:, None, :, None].expand(-1, cache_BKCD.shape[1], -1, cache_BKCD.shape[3])
    if scale_KD is not None:
        new_BSKD = (new_BSKD / scale_KD).round().clamp(-128, 127).to(cache_BKCD.dtype)
    cache_BKCD.scatter_(2, slots, narrowed(new_BSKD, cache_BKCD.dtype).transpose(1, 2))


@cached_attention.register_fake
def _(
    q_BSHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    out = q_BSHD.new_empty((*q_BSHD.shape[:-1], v_BSKD.shape[-1]))
    return out, torch.empty_like(key_cache_BKCD), torch.empty_like(value_cache_BKCD)
