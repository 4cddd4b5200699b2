"""Kernels over keys and values in plain slots: of all of them, or of pages that a table lists."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ....ir.ops.attention import OverPlainSlots
from ..dtypes import DTYPES
from ..launch import launch
from .bound_packed import slot_inputs
from .kernels import AttentionKernel, split_parts
from .kinds import AttentionKind


def over_all_slots(made: AttentionKernel, call: OverPlainSlots, parts: int | None) -> Tensor:
    """The kernel over keys and values [B, K, C, D], this step's written; gives [B, S, H, D]."""
    query = call.turned_query().unflatten(2, (made.kind.kv_heads, made.kind.group))
    return over_plain_slots(made, query, call, call.slots, parts)


def over_plain_slots(
    made: AttentionKernel,
    query_BSKGD: Tensor,
    call: OverPlainSlots,
    length: int,
    parts: int | None,
    table: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The same for turned queries, and so many slots at most; `table` lists the pages that are read."""
    kind, (key_scale_KD, value_scale_KD) = made.kind, call.scales
    assert isinstance(kind, AttentionKind)
    inputs = slot_inputs(query_BSKGD, call) | dict(table or {})
    if call.count_BK is not None:
        inputs["count"] = call.count_BK
    if key_scale_KD is not None and value_scale_KD is not None:
        inputs |= {"key_scale": key_scale_KD.float(), "value_scale": value_scale_KD.float()}
    found = launch(
        made.kernel,
        inputs,
        parts=parts or split_parts(made, query_BSKGD, length),
        dtypes={"out": DTYPES[kind.query]},
        tiles=made.tiles(query_BSKGD.shape[1]),
    )
    return found["out"].flatten(2, 3)
