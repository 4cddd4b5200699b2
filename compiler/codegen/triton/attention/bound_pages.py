"""Kernels in the place of `bounded_attention`: one token reads what is chosen, several read everything."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ....ir.ops.attention import OverOwnSlots
from ....ir.ops.bounded import BoundedAttention
from .bound_slots import over_plain_slots
from .choosing import ChoosingKernel, choose, refresh
from .kernels import AttentionKernel


def attend_bounded(
    whole: AttentionKernel,
    listed: AttentionKernel,
    choosing: ChoosingKernel,
    parts: int | None = None,
) -> Callable[[BoundedAttention], Tensor]:
    """The meaning of a call by its kernels; `parts` cuts every step so, None as the device wants it.

    Every new token of a step of several would choose for itself by the operator: here these read everything.
    """

    def attend(call: BoundedAttention) -> Tensor:
        OverOwnSlots.take_in(call, call.k_BSKD, call.v_BSKD, call.scales)
        refresh(choosing, call)
        query = call.turned_query().unflatten(2, (choosing.kind.kv_heads, choosing.kind.group))
        if query.shape[1] != 1:
            return over_plain_slots(whole, query, call, call.slots, parts)
        table = choose(choosing, call, query[:, 0])
        length = table["pages"].shape[2] * choosing.kind.paged.page
        return over_plain_slots(listed, query, call, length, parts, table)

    return attend
