"""Kernels in the place of `low_rank_attention`: one over the slots, one over the features, merged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ....ir.ops.low_rank import LowRankAttention
from .bound_packed import merged, over_slots, run
from .kernels import AttentionKernel
from .low_rank import LowRankKind, parts_of


def attend_low_rank(
    slots: AttentionKernel, features: AttentionKernel, parts: int | None = None
) -> Callable[[LowRankAttention], Tensor]:
    """The meaning of a call by its kernels; `parts` cuts both streams so, None as the device wants it."""
    kind = features.kind
    assert isinstance(kind, LowRankKind)

    def attend(call: LowRankAttention) -> Tensor:
        call.take_in_tokens()
        query = call.turned_query().unflatten(2, (kind.kv_heads, kind.group))
        given = _given(kind, query, call)
        states = [
            over_slots(slots, query, call, parts),
            run(features, given, query, given["low_key"].shape[1], parts),
        ]
        return merged(states).to(query.dtype).flatten(2, 3)

    return attend


def _given(kind: LowRankKind, query_BSKGD: Tensor, call: LowRankAttention) -> dict[str, Tensor]:
    """What the kernel over features is given: queries and the basis of keys in the parts keys are made in."""
    key_basis, value_basis = (
        basis_RM.unflatten(1, (kind.kv_heads, -1))
        for basis_RM in (call.key_basis_RM, call.value_basis_RM)
    )
    low = {"low_key": call.key_low_BCR, "low_value": call.value_low_BCR}
    found = {**low, "value_basis": value_basis}
    for name, tensor in (("query", query_BSKGD), ("basis", key_basis)):
        for part, view in parts_of(kind, tensor, call.interleaved).items():
            found[f"{part}_{name}"] = view
    if kind.half and call.cos_PR is not None and call.sin_PR is not None:
        # There is no token at an index that the tables lack.
        tokens = min(len(call.cos_PR), call.key_low_BCR.shape[1])
        found |= {"cos": call.cos_PR[:tokens], "sin": call.sin_PR[:tokens]}
        found |= {name: features[:, :tokens] for name, features in low.items()}
    begin_B, end_B = call.outside_slots()
    return found | {"begin": begin_B.to(torch.int32), "end": end_B.to(torch.int32)}
