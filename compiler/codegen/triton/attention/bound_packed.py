"""Kernels in the place of `packed_attention`: one over the slots, one a stream of packed tokens, merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ....ir.ops.attention import OverSlots
from ....ir.ops.packed import PackedAttention
from ..dtypes import DTYPES
from ..launch import launch
from .kernels import AttentionKernel, split_parts
from .packed import PackedKind

#: An output [B, S, K, G, F] and its log-sum-exp [B, S, K, G].
State = tuple[Tensor, Tensor]


def attend_packed(
    slots: AttentionKernel, *streams: AttentionKernel, parts: int | None = None
) -> Callable[[PackedAttention], Tensor]:
    """The meaning of a call by its kernels; `parts` cuts every stream so, None as the device wants it."""

    def attend(call: PackedAttention) -> Tensor:
        call.take_in(call.k_BSKD, call.v_BSKD)
        query = call.turned_query().unflatten(2, (slots.kind.kv_heads, slots.kind.group))
        states = [over_slots(slots, query, call, parts)]
        if call.bulk[0].shape[2]:  # there are no granules while a prompt is read whole
            pieces = call.pieces()
            states += [_over_stream(made, query, call.packed_B, pieces, parts) for made in streams]
        return merged(states).to(query.dtype).flatten(2, 3)

    return attend


def over_slots(
    made: AttentionKernel, query_BSKGD: Tensor, call: OverSlots, parts: int | None
) -> State:
    """The state over keys and values in slots [B, K, C, D], this step's written."""
    return run(made, slot_inputs(query_BSKGD, call), query_BSKGD, call.slots, parts)


def slot_inputs(query_BSKGD: Tensor, call: OverSlots) -> dict[str, Tensor]:
    """What every kernel over slots is given."""
    given = {"query": query_BSKGD, "key": call.key_cache_BKCD, "value": call.value_cache_BKCD}
    given["used"] = call.used_B.to(torch.int32)
    if call.sinks_H is not None:
        given["sink"] = call.sinks_H.to(query_BSKGD.dtype).unflatten(0, query_BSKGD.shape[2:4])
    return given


def _over_stream(
    made: AttentionKernel,
    query: Tensor,
    packed_B: Tensor,
    pieces: dict[str, Tensor],
    parts: int | None,
) -> State:
    kind = made.kind
    assert isinstance(kind, PackedKind)
    granules_B = packed_B // kind.form.granule
    given = {"query": query, "live": (granules_B * kind.tokens).to(torch.int32)}
    given |= {source.name: source.of(pieces[source.piece]) for source in kind.stream.sources}
    length = next(iter(pieces.values())).shape[2] * kind.tokens
    return run(made, given, query, length, parts)


def run(
    made: AttentionKernel,
    given: dict[str, Tensor],
    query: Tensor,
    length: int,
    parts: int | None,
) -> State:
    """A kernel's state over so many keys, for queries [B, S, ..]."""
    found = launch(
        made.kernel,
        given,
        parts=parts or split_parts(made, query, length),
        dtypes={"out": DTYPES["fp32"], "lse": DTYPES["fp32"]},
        tiles=made.tiles(query.shape[1]),
    )
    return found["out"], found["lse"]


def merged(states: Sequence[State]) -> Tensor:
    """Outputs weighted by exp(lse): the softmax over all of their keys. A state without keys counts nothing.

    The slots hold the new tokens at least, so one state of each row has keys.
    """
    if len(states) == 1:
        return states[0][0]
    lse = torch.stack([torch.nan_to_num(state[1], nan=float("-inf")) for state in states])
    weights = torch.softmax(lse, dim=0)[..., None]
    outs = torch.stack([torch.nan_to_num(state[0]) for state in states])
    return (outs * weights).sum(0)
