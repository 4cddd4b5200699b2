"""Attention over packed tokens in Triton's interpreter; started as `tests.codegen.triton.worker` is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from einfold.compiler.codegen.triton.attention.bound_packed import attend_packed
from einfold.compiler.codegen.triton.attention.kernels import (
    AttentionKernel,
    attention_kernel,
    kinds_at,
)
from einfold.compiler.codegen.triton.options import Tiles
from einfold.compiler.ir.kv.codes.codec import Seen, encode
from einfold.compiler.ir.kv.layout import CacheLayout
from einfold.compiler.ir.kv.store.minicache.codec import encode_pair
from einfold.compiler.ir.kv.store.minicache.storage import MiniCache
from einfold.compiler.ir.kv.store.packed import Packed
from einfold.compiler.ir.kv.store.storage import read_storage
from einfold.compiler.ir.ops.packed import PackedAttention
from einfold.compiler.ir.program import call_arguments

from ...programs import program
from .worker import compared, serve

HEADS, GRANULES, SLOTS = 2, 3, 12


def node_of(storage: Packed, request: dict[str, Any]) -> fx.Node:
    """The call of the deeper of two layers, with its types; it may read the first or be paired with it."""
    from einfold.compiler.passes.cache.attach_cache import AttachCache

    key, value = sizes_of(request)
    given = f"%q, %k, %v, {'%s' if request.get('sinks') else 'none'}"
    options = f"0.25, 0, {request.get('softcap', 0.0)}"
    found = program(f"""
        weight @s : f32[4]
        input %ids "input_ids" : i64[B, S]
        input %q "q" : f32[B, S, 4, {key}]
        input %k "k" : f32[B, S, {HEADS}, {key}]
        input %v "v" : f32[B, S, {HEADS}, {value}]
        read %s "s" : f32[4]
        call %a = einfold.attention({given}, 0, {options}) : f32[B, S, 4, {value}]
        call %o = einfold.attention({given}, 1, {options}) : f32[B, S, 4, {value}]
        output "a" = %a
        output "o" = %o
    """)
    own = f"storage={storage.text}"
    deeper = "storage=f32 owner=0" if request.get("reader") else own
    deeper += " partner=0" if isinstance(storage, MiniCache) else ""
    heads = f"heads=0,1 of={HEADS} key={key} value={value} policy=full"
    found.layout = CacheLayout.parse([f"cache 0.0 {heads} {own}", f"cache 1.0 {heads} {deeper}"])
    AttachCache().run(found)
    *_, node = found.nodes(PackedAttention.overload())
    return node


def sizes_of(request: dict[str, Any]) -> tuple[int, int]:
    """Numbers of a key and of a value."""
    key, value = request.get("sizes", (16, 16))
    return key, value


def pieces_of(storage: Packed, sizes: tuple[int, int]) -> list[Tensor]:
    """The pieces of random tokens in their order, as the deeper layer reads them where two share some."""
    keys, values = (torch.randn(2, HEADS, GRANULES * storage.granule, size) for size in sizes)
    if not isinstance(storage, MiniCache):
        return list(encode(storage, keys[0], values[0], Seen()).values())
    cut = [tuple(x.unflatten(2, (-1, storage.granule))) for x in (keys, values)]
    first, second = encode_pair(storage, *cut)
    return [(first | second)[name] for name in first]


def arguments(storage: Packed, node: fx.Node, request: dict[str, Any]) -> dict[str, Any]:
    """Random arguments: rows with all, none and some of their granules packed."""
    torch.manual_seed(0)
    (key, value), new = sizes_of(request), request["new"]
    granules = [GRANULES, 0, 1]
    rows = [pieces_of(storage, (key, value)) for _ in granules]
    options = {n: v for n, v in call_arguments(node).items() if not isinstance(v, fx.Node)}
    written = not request.get("reader")
    return {
        **options,
        "q_BSHD": torch.randn(3, new, 4, key),
        "k_BSKD": torch.randn(3, new, HEADS, key) if written else None,
        "v_BSKD": torch.randn(3, new, HEADS, value) if written else None,
        "key_cache_BKCD": torch.randn(3, HEADS, SLOTS, key),
        "value_cache_BKCD": torch.randn(3, HEADS, SLOTS, value),
        "used_B": torch.tensor([1, 6, 0]),
        "packed_B": torch.tensor(granules) * storage.granule,
        "bulk": [torch.stack(pieces) for pieces in zip(*rows, strict=True)],
        "sinks_H": torch.randn(4) if request.get("sinks") else None,
    }


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The error of the kernels against the operator, and whether both wrote the same slots."""
    storage = read_storage(request["storage"])
    assert isinstance(storage, Packed)
    node = node_of(storage, request)
    made: list[AttentionKernel] = []
    for kind in kinds_at(node):
        one = attention_kernel(kind, f"tested_{len(made)}", (0,), 64)
        small = replace(one, decode=Tiles(16, 16), kernel=replace(one.kernel, tiles=Tiles(16, 16)))
        made.append(small)
    given = arguments(storage, node, request)
    attend = attend_packed(*made, parts=request["parts"])
    error, same = compared(PackedAttention, attend, given)
    return {"error": error, "same slots": same, "kernels": len(made)}


if __name__ == "__main__":
    serve(answer)
