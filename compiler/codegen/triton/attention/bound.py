"""A kernel in the place of `cached_attention`: caches are written where they lie, then the kernel runs.

A layer that reads another's slots (`shared_attention`) has the same kernel, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from ....ir.ops.attention import CachedAttention
from ....ir.ops.bounded import BoundedAttention
from ....ir.ops.low_rank import LowRankAttention
from ....ir.ops.packed import PackedAttention
from ....ir.ops.record import operator_of
from ....ir.ops.shared import SharedAttention
from ....ir.program import Program
from .bound_low_rank import attend_low_rank
from .bound_packed import attend_packed
from .bound_pages import attend_bounded
from .bound_slots import over_all_slots
from .choosing import ChoosingKernel
from .choosing_kinds import choosing_kind
from .kernels import AttentionKernel, attentions, kinds_at


def bind(
    program: Program,
    kernels: Sequence[AttentionKernel],
    choosing: Sequence[ChoosingKernel] = (),
) -> dict[fx.Node, Callable[..., Any]]:
    """For each attention of the program, the function to call with its arguments instead."""
    of_kind: dict[Any, Any] = {made.kind: made for made in kernels}
    of_kind |= {made.kind: made for made in choosing}
    for made in kernels:
        made.kernel.function("whole")  # an absent Triton is told of now, not at the first token
    found = {}
    for node in attentions(program):
        operator = operator_of(node.target)
        assert operator is not None
        kinds: list[Any] = [*kinds_at(node)]
        kinds += [choosing_kind(node)] if operator is BoundedAttention else []
        attend = _BOUND[operator](*(of_kind[kind] for kind in kinds))
        found[node] = operator.standing_in(attend)
    return found


def attend_cached(
    made: AttentionKernel, parts: int | None = None
) -> Callable[[CachedAttention], Tensor]:
    """The meaning of a call by its kernel; `parts` cuts every step so, None as the device wants it."""

    def attend(call: CachedAttention) -> Tensor:
        call.take_in(call.k_BSKD, call.v_BSKD, call.scales)
        return over_all_slots(made, call, parts)

    return attend


def attend_shared(
    made: AttentionKernel, parts: int | None = None
) -> Callable[[SharedAttention], Tensor]:
    """The same for a layer that finds this step's tokens in the slots already."""
    return lambda call: over_all_slots(made, call, parts)


#: What makes the meaning of a call of its kernels: that over slots, then those of its streams.
_BOUND: dict[Any, Callable[..., Callable[[Any], Tensor]]] = {
    CachedAttention: attend_cached,
    SharedAttention: attend_shared,
    BoundedAttention: attend_bounded,
    PackedAttention: attend_packed,
    LowRankAttention: attend_low_rank,
}
