"""Kernels in the place of `packed_attention`: one over the slots, one a stream of packed tokens, merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ....ir.kv.store.storage import GroupShape
from ....ir.ops.attention import take_in
from ....ir.ops.packed import packed_storage, piece_names
from ..dtypes import DTYPES
from ..launch import launch
from .kernels import AttentionKernel, split_parts
from .packed import PackedKind

#: An output [B, S, K, G, F] and its log-sum-exp [B, S, K, G].
State = tuple[Tensor, Tensor]


def attend_packed(
    slots: AttentionKernel, streams: Sequence[AttentionKernel], parts: int | None = None
) -> Callable[..., Any]:
    """What takes the operator's arguments; `parts` cuts every stream so, None as the device wants it."""

    def attend(
        q_BSHD: Tensor,
        k_BSKD: Tensor | None,
        v_BSKD: Tensor | None,
        key_cache_BKCD: Tensor,
        value_cache_BKCD: Tensor,
        used_B: Tensor,
        packed_B: Tensor,
        bulk: Sequence[Tensor],
        sinks_H: Tensor | None,
        positions_BS: Tensor | None,
        cos_PR: Tensor | None,
        sin_PR: Tensor | None,
        layer: int,
        scale: float,
        softcap: float,
        interleaved: bool,
        storage: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rotary = (positions_BS, cos_PR, sin_PR, interleaved)
        caches = (key_cache_BKCD, value_cache_BKCD)
        q_BSHD, _ = take_in(q_BSHD, k_BSKD, v_BSKD, caches, used_B, rotary)
        query = q_BSHD.unflatten(2, (slots.kind.kv_heads, slots.kind.group))
        states = [over_slots(slots, query, caches, used_B, sinks_H, parts)]
        if bulk[0].shape[2]:  # there are no granules while a prompt is read whole
            shape = GroupShape(query.shape[2], key_cache_BKCD.shape[3], value_cache_BKCD.shape[3])
            names = piece_names(packed_storage(storage), shape)
            pieces = dict(zip(names, bulk, strict=True))
            states += [_over_stream(made, query, packed_B, pieces, parts) for made in streams]
        out = merged(states).to(q_BSHD.dtype).flatten(2, 3)
        return out, key_cache_BKCD, value_cache_BKCD

    return attend


def over_slots(
    made: AttentionKernel,
    query_BSKGD: Tensor,
    caches: tuple[Tensor, Tensor],
    used_B: Tensor,
    sinks_H: Tensor | None,
    parts: int | None,
) -> State:
    """The state over keys and values in slots [B, K, C, D], this step's written."""
    given = slot_inputs(query_BSKGD, caches, used_B, sinks_H)
    return run(made, given, query_BSKGD, caches[0].shape[2], parts)


def slot_inputs(
    query_BSKGD: Tensor, caches: tuple[Tensor, Tensor], used_B: Tensor, sinks_H: Tensor | None
) -> dict[str, Tensor]:
    """What every kernel over slots is given."""
    given = {"query": query_BSKGD, "key": caches[0], "value": caches[1]}
    given["used"] = used_B.to(torch.int32)
    if sinks_H is not None:
        given["sink"] = sinks_H.to(query_BSKGD.dtype).unflatten(0, query_BSKGD.shape[2:4])
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
