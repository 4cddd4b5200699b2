"""Attention over packed tokens in Triton's interpreter; started as `tests.triton.worker` is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from einfold.compiler.attention_kernels.bound_packed import attend_packed
from einfold.compiler.attention_kernels.kernels import AttentionKernel, attention_kernel, kinds_at
from einfold.compiler.codegen.triton.options import Tiles
from einfold.compiler.ir.cache.packing import Packed
from einfold.compiler.ir.cache.storages import read_storage
from einfold.compiler.ir.kv.codec import Seen, encode
from einfold.compiler.ir.ops import einfold_ops
from einfold.compiler.ir.ops.packed import packed_attention_in_place
from einfold.compiler.ir.program import call_arguments

from ..programs import program
from .worker import difference, serve

HEADS, SIZE, GRANULES, SLOTS = 2, 16, 3, 12


def node_of(storage: Packed, softcap: float, sinks: bool) -> fx.Node:
    """The call that a compiled program has, with its types."""
    from einfold.compiler.passes.cache.attach_cache import AttachCache
    from einfold.compiler.passes.cache.plan_cache import PlanCache
    from einfold.compiler.passes.kv_quant.layers import pack_groups

    given = f"%q, %k, %k, {'%s' if sinks else 'none'}"
    found = program(f"""
        weight @s : f32[4]
        input %ids "input_ids" : i64[B, S]
        input %q "q" : f32[B, S, 4, {SIZE}]
        input %k "k" : f32[B, S, {HEADS}, {SIZE}]
        read %s "s" : f32[4]
        call %o = einfold.attention({given}, 0, 0.25, 0, {softcap}) : f32[B, S, 4, {SIZE}]
        output "o" = %o
    """)
    PlanCache().run(found)
    pack_groups(found, storage)
    AttachCache().run(found)
    (node,) = found.nodes(einfold_ops.packed_attention.default)
    return node


def arguments(storage: Packed, node: fx.Node, new: int, sinks: bool) -> dict[str, Any]:
    """Random arguments: rows with all, none and some of their granules packed."""
    torch.manual_seed(0)
    granules, rows = [GRANULES, 0, 1], []
    for _ in granules:
        keys, values = (torch.randn(HEADS, GRANULES * storage.granule, SIZE) for _ in range(2))
        rows.append(encode(storage, keys, values, Seen()))
    options = {n: v for n, v in call_arguments(node).items() if not isinstance(v, fx.Node)}
    return {
        **options,
        "q_BSHD": torch.randn(3, new, 4, SIZE),
        "k_BSKD": torch.randn(3, new, HEADS, SIZE),
        "v_BSKD": torch.randn(3, new, HEADS, SIZE),
        "key_cache_BKCD": torch.randn(3, HEADS, SLOTS, SIZE),
        "value_cache_BKCD": torch.randn(3, HEADS, SLOTS, SIZE),
        "used_B": torch.tensor([1, 6, 0]),
        "packed_B": torch.tensor(granules) * storage.granule,
        "bulk": [torch.stack([row[name] for row in rows]) for name in rows[0]],
        "sinks_H": torch.randn(4) if sinks else None,
    }


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The error of the kernels against the operator, and whether both wrote the same slots."""
    storage = read_storage(request["storage"])
    assert isinstance(storage, Packed)
    sinks, softcap = request.get("sinks", False), request.get("softcap", 0.0)
    node = node_of(storage, softcap, sinks)
    made: list[AttentionKernel] = []
    for kind in kinds_at(node):
        one = attention_kernel(kind, f"tested_{len(made)}", (0,), 64)
        small = replace(one, decode=Tiles(16, 16), kernel=replace(one.kernel, tiles=Tiles(16, 16)))
        made.append(small)
    given = arguments(storage, node, request["new"], sinks)
    mine = {n: x.clone() if isinstance(x, Tensor) else x for n, x in given.items()}
    found, *slots = attend_packed(made[0], made[1:], request["parts"])(**mine)
    expected, *right = packed_attention_in_place(**given)
    same = all(torch.equal(a, b) for a, b in zip(slots, right, strict=True))
    return {"error": difference(found, expected), "same slots": same, "kernels": len(made)}


if __name__ == "__main__":
    serve(answer)
