"""A kernel in the place of `cached_attention`: caches are written where they lie, then the kernel runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..codegen.triton.launch import DTYPES, split_count
from ..ir.ops.rotary import rotary_reference
from ..ir.program import Program, call_arguments
from .kernels import SPLITS, AttentionKernel
from .kinds import cached_attentions

Function = Callable[..., Any]


def bind(program: Program, kernels: Sequence[AttentionKernel]) -> dict[fx.Node, Function]:
    """For each attention of the program, the function to call with its arguments instead."""
    of_layer = {layer: made for made in kernels for layer in made.layers}
    for made in kernels:
        made.kernel.function("whole")  # an absent Triton is told of now, not at the first token
    return {
        node: _in_place(of_layer[int(call_arguments(node)["layer"])])
        for node in cached_attentions(program)
    }


def _in_place(made: AttentionKernel) -> Function:
    kind = made.kind

    def attend(
        q_BSHD: Tensor,
        k_BSKD: Tensor,
        v_BSKD: Tensor,
        key_cache_BKCD: Tensor,
        value_cache_BKCD: Tensor,
        lengths_B: Tensor,
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
        if cos_PR is not None and sin_PR is not None and positions_BS is not None:
            q_BSHD = rotary_reference(q_BSHD, positions_BS, cos_PR, sin_PR, interleaved)
            k_BSKD = rotary_reference(k_BSKD, positions_BS, cos_PR, sin_PR, interleaved)
        new = q_BSHD.shape[1]
        slot_BS = lengths_B[:, None] + torch.arange(new, device=lengths_B.device)
        _write(key_cache_BKCD, k_BSKD, slot_BS, key_scale_KD)
        _write(value_cache_BKCD, v_BSKD, slot_BS, value_scale_KD)
        inputs = {
            "query": q_BSHD.unflatten(2, (kind.kv_heads, kind.group)),
            "key": key_cache_BKCD,
            "value": value_cache_BKCD,
            "length": lengths_B.to(torch.int32),
        }
        if sinks_H is not None:
            inputs["sink"] = sinks_H.to(q_BSHD.dtype).unflatten(0, (kind.kv_heads, kind.group))
        if key_scale_KD is not None and value_scale_KD is not None:
            inputs |= {"key_scale": key_scale_KD.float(), "value_scale": value_scale_KD.float()}
        found = made.kernel(
            inputs,
            parts=_parts(made, q_BSHD, key_cache_BKCD),
            dtypes={"out": DTYPES[kind.query]},
            tiles=made.tiles(new),
        )
        return found["out"].flatten(2, 3), key_cache_BKCD, value_cache_BKCD

    return attend


def _parts(made: AttentionKernel, q_BSHD: Tensor, cache_BKCD: Tensor) -> int:
    """How many parts of the cache run side by side: as many as fill the device, of those that there are."""
    batch, new = q_BSHD.shape[:2]
    tiles = made.tiles(new)
    programs = batch * made.kind.kv_heads * -(-new * made.kind.group // tiles.rows)
    wanted = split_count(made.kernel, programs, cache_BKCD.shape[2], tiles, cache_BKCD)
    return max(parts for parts in SPLITS if parts <= wanted)


def _write(cache_BKCD: Tensor, new_BSKD: Tensor, slot_BS: Tensor, scale_KD: Tensor | None) -> None:
    """The operator's own write, in place: rounded by the scales where there are any."""
    slots = slot_BS[:, None, :, None].expand(-1, cache_BKCD.shape[1], -1, cache_BKCD.shape[3])
    if scale_KD is not None:
        new_BSKD = (new_BSKD / scale_KD).round().clamp(-128, 127)
    cache_BKCD.scatter_(2, slots, new_BSKD.transpose(1, 2).to(cache_BKCD.dtype))
