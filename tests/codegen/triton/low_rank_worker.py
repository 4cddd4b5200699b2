"""Attention over features in Triton's interpreter; started as `tests.codegen.triton.worker` is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from einfold.compiler.codegen.triton.attention.bound_low_rank import attend_low_rank
from einfold.compiler.codegen.triton.attention.kernels import (
    AttentionKernel,
    Kind,
    attention_kernel,
)
from einfold.compiler.codegen.triton.attention.kinds import AttentionKind
from einfold.compiler.codegen.triton.attention.low_rank import LowRankKind
from einfold.compiler.codegen.triton.options import Tiles
from einfold.compiler.ir.ops.low_rank import LowRankAttention

from .worker import compared, serve

#: Rows of which some, none and most tokens stand as features alone, behind two tokens that stay.
LENGTHS, USED, FIRST, SLOTS = [20, 5, 33], [6, 5, 9], 2, 14
#: Features have room for more tokens than the tables have places.
CAPACITY, PLACES = 43, 38


def arguments(kind: LowRankKind, request: dict[str, Any]) -> dict[str, Any]:
    """Random arguments of `low_rank_attention` for a kind."""
    torch.manual_seed(0)
    new, heads, rows = request["new"], kind.kv_heads, len(LENGTHS)
    features = torch.float16 if kind.features == "fp16" else torch.float32
    ranks = (kind.key_rank, kind.value_rank)
    sizes = (kind.key_size, kind.value_size)
    caches = [torch.randn(rows, heads, SLOTS, size) for size in sizes]
    low = [torch.randn(rows, CAPACITY, rank).to(features) for rank in ranks]
    bases = [
        torch.randn(rank, heads * size) * rank**-0.5
        for rank, size in zip(ranks, sizes, strict=True)
    ]
    lengths = torch.tensor(LENGTHS)
    angles = torch.arange(PLACES)[:, None] / torch.arange(1, kind.half + 1)
    rotated = kind.half > 0
    return {
        "q_BSHD": torch.randn(rows, new, heads * kind.group, kind.key_size),
        "k_BSKD": torch.randn(rows, new, heads, kind.key_size),
        "v_BSKD": torch.randn(rows, new, heads, kind.value_size),
        "key_cache_BKCD": caches[0],
        "value_cache_BKCD": caches[1],
        "key_low_BCR": low[0],
        "value_low_BCR": low[1],
        "key_basis_RM": bases[0],
        "value_basis_RM": bases[1],
        "used_B": torch.tensor(USED),
        "lengths_B": lengths,
        "sinks_H": torch.randn(heads * kind.group) if request.get("sinks") else None,
        "positions_BS": lengths[:, None] + torch.arange(new) if rotated else None,
        "cos_PR": angles.cos() if rotated else None,
        "sin_PR": angles.sin() if rotated else None,
        "layer": 0,
        "scale": kind.scale,
        "softcap": kind.softcap,
        "interleaved": request.get("interleaved", False),
        "first": FIRST,
    }


def kernel(kind: Kind) -> AttentionKernel:
    """The kernel of a kind in the smallest tiles."""
    made, small = attention_kernel(kind, "tested", (0,), 64), Tiles(16, 16)
    return replace(made, decode=small, kernel=replace(made.kernel, tiles=small))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The error of the kernels against the operator, and whether both wrote the same caches."""
    kind = LowRankKind(**request["kind"])
    of_slots = AttentionKind(
        kv_heads=kind.kv_heads,
        group=kind.group,
        key_size=kind.key_size,
        value_size=kind.value_size,
        scale=kind.scale,
        window=0,
        softcap=kind.softcap,
        sinks=request.get("sinks", False),
        query="fp32",
        cache="fp32",
        scaled=False,
        lse=True,
    )
    given = arguments(kind, request)
    attend = attend_low_rank(kernel(of_slots), kernel(kind), request["parts"])
    error, same = compared(LowRankAttention, attend, given)
    return {"error": error, "same caches": same}


if __name__ == "__main__":
    serve(answer)
