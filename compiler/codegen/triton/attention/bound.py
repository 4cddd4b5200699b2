"""A kernel in the place of `cached_attention`: caches are written where they lie, then the kernel runs.

A layer that reads another's slots (`shared_attention`) has the same kernel, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from ....ir.ops import einfold_ops
from ....ir.ops.attention import take_in
from ....ir.ops.rotary import turned
from ....ir.program import Program
from ..dtypes import DTYPES
from ..launch import launch
from .bound_low_rank import attend_low_rank
from .bound_packed import attend_packed, slot_inputs
from .kernels import ATTENTIONS, AttentionKernel, kinds_at, split_parts
from .kinds import AttentionKind

Function = Callable[..., Any]


def bind(program: Program, kernels: Sequence[AttentionKernel]) -> dict[fx.Node, Function]:
    """For each attention of the program, the function to call with its arguments instead."""
    of_kind = {made.kind: made for made in kernels}
    for made in kernels:
        made.kernel.function("whole")  # an absent Triton is told of now, not at the first token
    found = {}
    for node in program.nodes(*ATTENTIONS):
        slots, *streams = (of_kind[kind] for kind in kinds_at(node))
        if node.target is einfold_ops.shared_attention.default:
            found[node] = attend_shared(slots)
        elif node.target is einfold_ops.low_rank_attention.default:
            found[node] = attend_low_rank(slots, streams[0])
        else:
            found[node] = attend_packed(slots, streams) if streams else attend_in_place(slots)
    return found


def attend_in_place(made: AttentionKernel, parts: int | None = None) -> Function:
    """What takes the operator's arguments; `parts` cuts every step so, None as the device wants it."""

    def attend(
        q_BSHD: Tensor,
        k_BSKD: Tensor,
        v_BSKD: Tensor,
        key_cache_BKCD: Tensor,
        value_cache_BKCD: Tensor,
        used_B: Tensor,
        count_BK: Tensor | None,
        sinks_H: Tensor | None,
        positions_BS: Tensor | None,
        cos_PR: Tensor | None,
        sin_PR: Tensor | None,
        key_scale_KD: Tensor | None,
        value_scale_KD: Tensor | None,
        layer: int,
        scale: float,
        window: int,
        softcap: float,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rotary = (positions_BS, cos_PR, sin_PR, interleaved)
        caches, scales = (key_cache_BKCD, value_cache_BKCD), (key_scale_KD, value_scale_KD)
        q_BSHD, _ = take_in(q_BSHD, k_BSKD, v_BSKD, caches, used_B, rotary, scales)
        out = _over_slots(made, q_BSHD, caches, used_B, count_BK, sinks_H, scales, parts)
        return out, key_cache_BKCD, value_cache_BKCD

    return attend


def attend_shared(made: AttentionKernel, parts: int | None = None) -> Function:
    """What takes the arguments of `shared_attention`: the slots hold this step's tokens already."""

    def attend(
        q_BSHD: Tensor,
        key_cache_BKCD: Tensor,
        value_cache_BKCD: Tensor,
        used_B: Tensor,
        count_BK: Tensor | None,
        sinks_H: Tensor | None,
        positions_BS: Tensor | None,
        cos_PR: Tensor | None,
        sin_PR: Tensor | None,
        key_scale_KD: Tensor | None,
        value_scale_KD: Tensor | None,
        layer: int,
        scale: float,
        window: int,
        softcap: float,
        interleaved: bool,
    ) -> Tensor:
        q_BSHD = turned(q_BSHD, positions_BS, cos_PR, sin_PR, interleaved)
        return _over_slots(
            made,
            q_BSHD,
            (key_cache_BKCD, value_cache_BKCD),
            used_B,
            count_BK,
            sinks_H,
            (key_scale_KD, value_scale_KD),
            parts,
        )

    return attend


def _over_slots(
    made: AttentionKernel,
    q_BSHD: Tensor,
    caches: tuple[Tensor, Tensor],
    used_B: Tensor,
    count_BK: Tensor | None,
    sinks_H: Tensor | None,
    scales: tuple[Tensor | None, Tensor | None],
    parts: int | None,
) -> Tensor:
    """The kernel over keys and values [B, K, C, D], this step's written; gives [B, S, H, D]."""
    kind, (key_scale_KD, value_scale_KD) = made.kind, scales
    assert isinstance(kind, AttentionKind)
    query = q_BSHD.unflatten(2, (kind.kv_heads, kind.group))
    inputs = slot_inputs(query, caches, used_B, sinks_H)
    if count_BK is not None:
        inputs["count"] = count_BK
    if key_scale_KD is not None and value_scale_KD is not None:
        inputs |= {"key_scale": key_scale_KD.float(), "value_scale": value_scale_KD.float()}
    found = launch(
        made.kernel,
        inputs,
        parts=parts or split_parts(made, q_BSHD, caches[0].shape[2]),
        dtypes={"out": DTYPES[kind.query]},
        tiles=made.tiles(q_BSHD.shape[1]),
    )
    return found["out"].flatten(2, 3)
