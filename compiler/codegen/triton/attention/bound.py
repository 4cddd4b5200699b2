"""A kernel in the place of `cached_attention`: caches are written where they lie, then the kernel runs.

A layer that reads another's slots (`shared_attention`) has the same kernel, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from ....ir.ops.attention import CachedAttention
from ....ir.ops.low_rank import LowRankAttention
from ....ir.ops.packed import PackedAttention
from ....ir.ops.record import operator_of
from ....ir.ops.shared import SharedAttention
from ....ir.program import Program
from ..dtypes import DTYPES
from ..launch import launch
from .bound_low_rank import attend_low_rank
from .bound_packed import attend_packed, slot_inputs
from .kernels import AttentionKernel, attentions, kinds_at, split_parts
from .kinds import AttentionKind


def bind(program: Program, kernels: Sequence[AttentionKernel]) -> dict[fx.Node, Callable[..., Any]]:
    """For each attention of the program, the function to call with its arguments instead."""
    of_kind = {made.kind: made for made in kernels}
    for made in kernels:
        made.kernel.function("whole")  # an absent Triton is told of now, not at the first token
    found = {}
    for node in attentions(program):
        operator = operator_of(node.target)
        assert operator is not None
        attend = _BOUND[operator](*(of_kind[kind] for kind in kinds_at(node)))
        found[node] = operator.standing_in(attend)
    return found


def attend_cached(
    made: AttentionKernel, parts: int | None = None
) -> Callable[[CachedAttention], Tensor]:
    """The meaning of a call by its kernel; `parts` cuts every step so, None as the device wants it."""

    def attend(call: CachedAttention) -> Tensor:
        call.take_in(call.k_BSKD, call.v_BSKD, call.scales)
        return _over_slots(made, call, parts)

    return attend


def attend_shared(
    made: AttentionKernel, parts: int | None = None
) -> Callable[[SharedAttention], Tensor]:
    """The same for a layer that finds this step's tokens in the slots already."""
    return lambda call: _over_slots(made, call, parts)


def _over_slots(
    made: AttentionKernel, call: CachedAttention | SharedAttention, parts: int | None
) -> Tensor:
    """The kernel over keys and values [B, K, C, D], this step's written; gives [B, S, H, D]."""
    kind, (key_scale_KD, value_scale_KD) = made.kind, call.scales
    assert isinstance(kind, AttentionKind)
    query = call.turned_query().unflatten(2, (kind.kv_heads, kind.group))
    inputs = slot_inputs(query, call)
    if call.count_BK is not None:
        inputs["count"] = call.count_BK
    if key_scale_KD is not None and value_scale_KD is not None:
        inputs |= {"key_scale": key_scale_KD.float(), "value_scale": value_scale_KD.float()}
    found = launch(
        made.kernel,
        inputs,
        parts=parts or split_parts(made, query, call.slots),
        dtypes={"out": DTYPES[kind.query]},
        tiles=made.tiles(query.shape[1]),
    )
    return found["out"].flatten(2, 3)


#: What makes the meaning of a call of its kernels: that over slots, then those of its streams.
_BOUND: dict[Any, Callable[..., Callable[[Any], Tensor]]] = {
    CachedAttention: attend_cached,
    SharedAttention: attend_shared,
    PackedAttention: attend_packed,
    LowRankAttention: attend_low_rank,
}
