"""Kernels in the place of `low_rank_attention`: one over the slots, one over the features, merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ....ir.ops.attention import new_slots, take_in
from ....ir.ops.low_rank import outside_slots, write_features
from .bound_packed import merged, over_slots, run
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
        rotary = (positions_BS, cos_PR, sin_PR, interleaved)
        caches = (key_cache_BKCD, value_cache_BKCD)
        q_BSHD, _ = take_in(q_BSHD, k_BSKD, v_BSKD, caches, used_B, rotary)
        kind = features.kind
        assert isinstance(kind, LowRankKind)
        query = q_BSHD.unflatten(2, (kind.kv_heads, kind.group))
        bases = (key_basis_RM, value_basis_RM)
        given = _given(kind, query, (key_low_BCR, value_low_BCR), bases, interleaved)
        if kind.half and cos_PR is not None and sin_PR is not None:
            # There is no token at an index that the tables lack.
            tokens = min(len(cos_PR), key_low_BCR.shape[1])
            given |= {"cos": cos_PR[:tokens], "sin": sin_PR[:tokens]}
            given |= {name: given[name][:, :tokens] for name in ("low_key", "low_value")}
        edges = zip(("begin", "end"), outside_slots(used_B, lengths_B, first), strict=True)
        given |= {name: edge_B.to(torch.int32) for name, edge_B in edges}
        states = [
            over_slots(slots, query, caches, used_B, sinks_H, parts),
            run(features, given, query, given["low_key"].shape[1], parts),
        ]
        out = merged(states).to(q_BSHD.dtype).flatten(2, 3)
        return out, key_cache_BKCD, value_cache_BKCD, key_low_BCR, value_low_BCR

    return attend


def _given(
    kind: LowRankKind,
    query_BSKGD: Tensor,
    low_BCR: tuple[Tensor, Tensor],
    bases_RM: tuple[Tensor, Tensor],
    interleaved: bool,
) -> dict[str, Tensor]:
    """Features and bases; queries and the basis of keys in the parts that keys are made in."""
    key_basis, value_basis = (basis.unflatten(1, (kind.kv_heads, -1)) for basis in bases_RM)
    found = {"low_key": low_BCR[0], "low_value": low_BCR[1], "value_basis": value_basis}
    for name, tensor in (("query", query_BSKGD), ("basis", key_basis)):
        for part, view in parts_of(kind, tensor, interleaved).items():
            found[f"{part}_{name}"] = view
    return found
