"""Attention over a window of tokens as they are, and over features of the older ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv.codes.affine import narrowed
from .attention import new_slots, take_in, visible_slots
from .packed import partial_attention
from .rotary import turned

#: Older tokens whose keys and values are rebuilt at a time.
TILE = 1024


@torch.library.custom_op("einfold::low_rank_attention", mutates_args=())
def low_rank_attention(
    q_BSHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    key_cache_BKCD: Tensor,
    value_cache_BKCD: Tensor,
    key_low_BCR: Tensor,
    value_low_BCR: Tensor,
    key_basis_RM: Tensor,
    value_basis_RM: Tensor,
    used_B: Tensor,
    lengths_B: Tensor,
    sinks_H: Tensor | None,
    positions_BS: Tensor | None,
    cos_PR: Tensor | None,
    sin_PR: Tensor | None,
    layer: int,
    scale: float,
    softcap: float,
    interleaved: bool,
    first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention of S new tokens over slots and over features (CSKV, Wang et al. 2024, section 3.2).

    Row b has seen lengths[b] tokens, of which its slots hold the `first` first and the newest, used[b] in
    all. New tokens are written behind both: their keys (rotated) and values into slots, and their features
    k @ basis.T, of all KV heads together and of keys before the rotation, at the token's index.

    A query sees the slots as in `einfold::cached_attention`, and of the tokens that are in no slot their keys
    features @ basis, rotated at the token's index (positions of a row must be its tokens' indices), and
    values likewise. These are rebuilt in tiles, whose partial states are merged.

    Gives (out [B, S, H, D], key cache, value cache, key features, value features). A target may write the
    last four in place.
    """
    return low_rank_attention_in_place(
        q_BSHD,
        k_BSKD,
        v_BSKD,
        key_cache_BKCD.clone(),
        value_cache_BKCD.clone(),
        key_low_BCR.clone(),
        value_low_BCR.clone(),
        key_basis_RM,
        value_basis_RM,
        used_B,
        lengths_B,
        sinks_H,
        positions_BS,
        cos_PR,
        sin_PR,
        layer,
        scale,
        softcap,
        interleaved,
        first,
    )


def low_rank_attention_in_place(
    q_BSHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    key_cache_BKCD: Tensor,
    value_cache_BKCD: Tensor,
    key_low_BCR: Tensor,
    value_low_BCR: Tensor,
    key_basis_RM: Tensor,
    value_basis_RM: Tensor,
    used_B: Tensor,
    lengths_B: Tensor,
    sinks_H: Tensor | None,
    positions_BS: Tensor | None,
    cos_PR: Tensor | None,
    sin_PR: Tensor | None,
    layer: int,
    scale: float,
    softcap: float,
    interleaved: bool,
    first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`einfold::low_rank_attention` that writes the caches it is given and gives them back."""
    token_BS = new_slots(lengths_B, q_BSHD.shape[1])
    write_features(key_low_BCR, k_BSKD, key_basis_RM, token_BS)
    write_features(value_low_BCR, v_BSKD, value_basis_RM, token_BS)
    rotary = (positions_BS, cos_PR, sin_PR, interleaved)
    caches = (key_cache_BKCD, value_cache_BKCD)
    q_BSHD, slot_BS = take_in(q_BSHD, k_BSKD, v_BSKD, caches, used_B, rotary)
    kv_heads, slots = key_cache_BKCD.shape[1:3]
    q_BKGSD = q_BSHD.transpose(1, 2).unflatten(1, (kv_heads, -1))
    visible_BSC = visible_slots(slot_BS, slots, 0, None)
    state = partial_attention(
        q_BKGSD, key_cache_BKCD, value_cache_BKCD, visible_BSC, scale, softcap
    )
    start_B, end_B = outside_slots(used_B, lengths_B, first)
    for begin in range(0, int(end_B.max()), TILE):
        end = min(begin + TILE, int(end_B.max()))
        token_T = torch.arange(begin, end, device=used_B.device)
        keys, values = (
            (low_BCR[:, begin:end].to(basis.dtype) @ basis).unflatten(2, (kv_heads, -1))
            for low_BCR, basis in ((key_low_BCR, key_basis_RM), (value_low_BCR, value_basis_RM))
        )
        token_BT = None if positions_BS is None else token_T.expand(len(used_B), -1)
        keys = turned(keys, token_BT, cos_PR, sin_PR, interleaved)
        visible_BT = (token_T >= start_B[:, None]) & (token_T < end_B[:, None])
        state = state.merged(
            partial_attention(
                q_BKGSD,
                keys.transpose(1, 2),
                values.transpose(1, 2),
                visible_BT[:, None],
                scale,
                softcap,
            )
        )
    return state.attention(sinks_H), key_cache_BKCD, value_cache_BKCD, key_low_BCR, value_low_BCR


def outside_slots(used_B: Tensor, lengths_B: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The first token of each row that no slot holds, and the first behind it that one holds again."""
    start_B = used_B.clamp(max=first)
    return start_B, lengths_B - used_B + start_B


def write_features(low_BCR: Tensor, new_BSKD: Tensor, basis_RM: Tensor, token_BS: Tensor) -> None:
    """Writes the features of new tokens at their indices, in place."""
    features_BSR = new_BSKD.flatten(2) @ basis_RM.T
    index_BSR = token_BS[:, :, None].expand_as(features_BSR)
    low_BCR.scatter_(1, index_BSR, narrowed(features_BSR, low_BCR.dtype))


@low_rank_attention.register_fake
def _(
    q_BSHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    key_cache_BKCD: Tensor,
    value_cache_BKCD: Tensor,
    key_low_BCR: Tensor,
    value_low_BCR: Tensor,
    key_basis_RM: Tensor,
    value_basis_RM: Tensor,
    used_B: Tensor,
    lengths_B: Tensor,
    sinks_H: Tensor | None,
    positions_BS: Tensor | None,
    cos_PR: Tensor | None,
    sin_PR: Tensor | None,
    layer: int,
    scale: float,
    softcap: float,
    interleaved: bool,
    first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    for low, basis, new in (
        (key_low_BCR, key_basis_RM, k_BSKD),
        (value_low_BCR, value_basis_RM, v_BSKD),
    ):
        channels = int(new.shape[2]) * int(new.shape[3])
        if (int(low.shape[2]), channels) != (int(basis.shape[0]), int(basis.shape[1])):
            raise ValueError("a basis is [features, channels of all KV heads]")
    out = q_BSHD.new_empty((*q_BSHD.shape[:-1], v_BSKD.shape[-1]))
    caches = (key_cache_BKCD, value_cache_BKCD, key_low_BCR, value_low_BCR)
    kept = [torch.empty_like(cache) for cache in caches]
    return out, kept[0], kept[1], kept[2], kept[3]
