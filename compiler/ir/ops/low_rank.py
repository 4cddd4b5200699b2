"""Attention over a window of tokens as they are, and over features of the older ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kv.codes.affine import narrowed
from .attention import OverSlots, token_indices
from .packed import partial_attention, partial_over_slots
from .record import OPERATORS
from .rotary import turned

#: Older tokens whose keys and values are rebuilt at a time.
TILE = 1024


@OPERATORS.register
@dataclass(eq=False)
class LowRankAttention(OverSlots):
    """Attention of S new tokens over slots and over features (CSKV, Wang et al. 2024, section 3.2).

    Row b has seen lengths[b] tokens, of which its slots hold the `first` first and the newest, used[b] in
    all. New tokens are written behind both: their keys (rotated) and values into slots, and their features
    k @ basis.T, of all KV heads together and of keys before the rotation, at the token's index.

    A query sees the slots as in `CachedAttention`, and of the tokens that are in no slot their keys
    features @ basis, rotated at the token's index (positions of a row must be its tokens' indices), and
    values likewise. These are rebuilt in tiles, whose partial states are merged.

    Gives (out [B, S, H, D], key cache, value cache, key features, value features).
    """

    name = "low_rank_attention"
    writes = ("key_cache_BKCD", "value_cache_BKCD", "key_low_BCR", "value_low_BCR")

    q_BSHD: Tensor
    k_BSKD: Tensor
    v_BSKD: Tensor
    key_cache_BKCD: Tensor
    value_cache_BKCD: Tensor
    key_low_BCR: Tensor
    value_low_BCR: Tensor
    key_basis_RM: Tensor
    value_basis_RM: Tensor
    used_B: Tensor
    lengths_B: Tensor
    sinks_H: Tensor | None
    positions_BS: Tensor | None
    cos_PR: Tensor | None
    sin_PR: Tensor | None
    layer: int
    scale: float
    softcap: float
    interleaved: bool
    first: int

    def run(self) -> Tensor:
        self.take_in_tokens()
        query, state = partial_over_slots(self)
        start_B, end_B = self.outside_slots()
        total = int(end_B.max())
        for begin in range(0, total, TILE):
            end = min(begin + TILE, total)
            keys, values = self._rebuilt(begin, end)
            token_T = torch.arange(begin, end, device=self.used_B.device)
            visible_BT = (token_T >= start_B[:, None]) & (token_T < end_B[:, None])
            tiled = partial_attention(
                query, keys, values, visible_BT[:, None], self.scale, self.softcap
            )
            state = state.merged(tiled)
        return state.attention(self.sinks_H)

    def take_in_tokens(self) -> None:
        """Writes the new tokens into slots and their features at their indices, in place."""
        token_BS = token_indices(self.lengths_B, self.q_BSHD.shape[1])
        write_features(self.key_low_BCR, self.k_BSKD, self.key_basis_RM, token_BS)
        write_features(self.value_low_BCR, self.v_BSKD, self.value_basis_RM, token_BS)
        self.take_in(self.k_BSKD, self.v_BSKD)

    def outside_slots(self) -> tuple[Tensor, Tensor]:
        """The first token of each row that no slot holds, and the first behind it that one holds again."""
        start_B = self.used_B.clamp(max=self.first)
        return start_B, self.lengths_B - self.used_B + start_B

    def _rebuilt(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys, turned, and values [B, K, T, D] of some tokens, from their features."""
        heads = self.key_cache_BKCD.shape[1]
        keys, values = (
            (low_BCR[:, begin:end].to(basis.dtype) @ basis).unflatten(2, (heads, -1))
            for low_BCR, basis in (
                (self.key_low_BCR, self.key_basis_RM),
                (self.value_low_BCR, self.value_basis_RM),
            )
        )
        if self.positions_BS is not None:
            token_T = torch.arange(begin, end, device=self.used_B.device)
            token_BT = token_T.expand(len(self.used_B), -1)
            keys = turned(keys, token_BT, self.cos_PR, self.sin_PR, self.interleaved)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def shapes(self) -> Tensor:
        for low, basis, new in (
            (self.key_low_BCR, self.key_basis_RM, self.k_BSKD),
            (self.value_low_BCR, self.value_basis_RM, self.v_BSKD),
        ):
            channels = int(new.shape[2]) * int(new.shape[3])
            if (int(low.shape[2]), channels) != (int(basis.shape[0]), int(basis.shape[1])):
                raise ValueError("a basis is [features, channels of all KV heads]")
        return super().shapes()


def write_features(low_BCR: Tensor, new_BSKD: Tensor, basis_RM: Tensor, token_BS: Tensor) -> None:
    """Writes the features of new tokens at their indices, in place."""
    features_BSR = new_BSKD.flatten(2) @ basis_RM.T
    index_BSR = token_BS[:, :, None].expand_as(features_BSR)
    low_BCR.scatter_(1, index_BSR, narrowed(features_BSR, low_BCR.dtype))
