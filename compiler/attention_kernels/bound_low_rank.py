"""Kernels in the place of `low_rank_attention`: one over the slots, one over the features, merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ir.ops.attention import new_slots, write_slots
from ..ir.ops.low_rank import outside_slots, write_features
from ..ir.ops.rotary import turned
from .bound_packed import merged, run
from .kernels import AttentionKernel
from .low_rank import LowRankKind, parts_of


def attend_low_rank(
    slots: AttentionKernel, features: AttentionKernel, parts: int | None = None
) -> Callable[..., Any]:
    """What takes the operator's arguments; `parts` cuts both streams so, None as the device wants it."""

    def attend(
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
        token_BS = new_slots(lengths_B, q_BSHD.shape[1])
        write_features(key_low_BCR, k_BSKD, key_basis_RM, token_BS)
        write_features(value_low_BCR, v_BSKD, value_basis_RM, token_BS)
        q_BSHD = turned(q_BSHD, positions_BS, cos_PR, sin_PR, interleaved)
        k_BSKD = turned(k_BSKD, positions_BS, cos_PR, sin_PR, interleaved)
        slot_BS = new_slots(used_B, q_BSHD.shape[1])
        write_slots(key_cache_BKCD, k_BSKD, slot_BS, None)
        write_slots(value_cache_BKCD, v_BSKD, slot_BS, None)
        kind = features.kind
        assert isinstance(kind, LowRankKind)
        query = q_BSHD.unflatten(2, (kind.kv_heads, kind.group))
        over_slots = {"query": query, "key": key_cache_BKCD, "value": value_cache_BKCD}
        over_slots["used"] = used_B.to(torch.int32)
        if sinks_H is not None:
            over_slots["sink"] = sinks_H.to(q_BSHD.dtype).unflatten(0, query.shape[2:4])
        over_features = _views(kind, query, key_basis_RM, interleaved)
        over_features["value_basis"] = value_basis_RM.unflatten(1, (kind.kv_heads, -1))
        length = key_low_BCR.shape[1]
        if kind.half and cos_PR is not None and sin_PR is not None:
            # There is no token at an index that the tables lack.
            length = min(length, cos_PR.shape[0])
            over_features |= {"cos": cos_PR[:length], "sin": sin_PR[:length]}
        over_features |= {
            "low_key": key_low_BCR[:, :length],
            "low_value": value_low_BCR[:, :length],
        }
        begin_B, end_B = outside_slots(used_B, lengths_B, first)
        over_features |= {"begin": begin_B.to(torch.int32), "end": end_B.to(torch.int32)}
        states = [
            run(slots, over_slots, q_BSHD, key_cache_BKCD.shape[2], parts),
            run(features, over_features, q_BSHD, length, parts),
        ]
        out = merged(states).to(q_BSHD.dtype).flatten(2, 3)
        return out, key_cache_BKCD, value_cache_BKCD, key_low_BCR, value_low_BCR

    return attend


def _views(
    kind: LowRankKind, query_BSKGD: Tensor, basis_RM: Tensor, interleaved: bool
) -> dict[str, Tensor]:
    """Queries and the basis of keys in the parts that keys are made in."""
    given = {"query": query_BSKGD, "basis": basis_RM.unflatten(1, (kind.kv_heads, -1))}
    return {
        f"{part}_{name}": view
        for name, tensor in given.items()
        for part, view in parts_of(kind, tensor, interleaved).items()
    }
