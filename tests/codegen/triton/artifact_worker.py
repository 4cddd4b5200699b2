"""Runs Triton artifacts in Triton's interpreter; started as `tests.codegen.triton.worker` is."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import einfold
from einfold.compiler.codegen.triton.attention.bound import attend_cached, attend_shared
from einfold.compiler.codegen.triton.attention.kernels import attention_kernel
from einfold.compiler.codegen.triton.attention.kinds import AttentionKind
from einfold.compiler.codegen.triton.dtypes import DTYPES
from einfold.compiler.codegen.triton.options import Tiles
from einfold.compiler.ir.ops.attention import CachedAttention
from einfold.compiler.ir.ops.shared import SharedAttention

from ...allocator import asked
from ...simulated_graphs import SimulatedGraphs
from .worker import compared, serve


def arguments(kind: AttentionKind, new: int, slots: int, used: list[int]) -> dict[str, Any]:
    """Random arguments of `cached_attention` for a kind: so many new tokens behind `used` slots a row."""
    torch.manual_seed(0)
    batch, heads = len(used), kind.kv_heads * kind.group

    def cache(size: int) -> Tensor:
        if kind.halved:
            return torch.randint(256, (batch, kind.kv_heads, slots, size // 2), dtype=torch.uint8)
        full = torch.randn(batch, kind.kv_heads, slots, size)
        return (full * 40).to(torch.int8) if kind.scaled else full.to(DTYPES[kind.cache])

    scales = {
        f"{part}_scale_KD": torch.rand(kind.kv_heads, size) / 40 if kind.scaled else None
        for part, size in (("key", kind.key_size), ("value", kind.value_size))
    }
    positions = torch.tensor(used)[:, None] + torch.arange(new)
    angles = torch.arange(slots)[:, None] / torch.arange(1, kind.key_size // 2 + 1)
    return {
        "q_BSHD": torch.randn(batch, new, heads, kind.key_size),
        "k_BSKD": torch.randn(batch, new, kind.kv_heads, kind.key_size),
        "v_BSKD": torch.randn(batch, new, kind.kv_heads, kind.value_size),
        "key_cache_BKCD": cache(kind.key_size),
        "value_cache_BKCD": cache(kind.value_size),
        "used_B": torch.tensor(used),
        # Slot 0 of the first row stands for nothing, of the others for several tokens.
        "count_BK": torch.arange(batch).float()[:, None].expand(-1, kind.kv_heads) * 5
        if kind.counted
        else None,
        "sinks_H": torch.randn(heads) if kind.sinks else None,
        "positions_BS": positions,
        "cos_PR": angles.cos(),
        "sin_PR": angles.sin(),
        **scales,
        "layer": 0,
        "scale": kind.scale,
        "window": kind.window,
        "softcap": kind.softcap,
        "interleaved": False,
    }


def kernel_error(request: dict[str, Any]) -> dict[str, Any]:
    """The error of a kind's kernel against the operator, and whether both wrote the same caches.

    With `shared` another layer reads what was written then, and its error is told too.
    """
    kind = AttentionKind(**request["kind"])
    made = attention_kernel(kind, "tested", (0,), 64)
    made = replace(made, decode=Tiles(16, 16), kernel=replace(made.kernel, tiles=Tiles(16, 16)))
    given = arguments(kind, request["new"], 37, request["used"])
    error, same = compared(CachedAttention, attend_cached(made, request["parts"]), given)
    told = {"error": error, "same caches": same}
    if request.get("shared"):
        reader = {n: x for n, x in given.items() if n not in ("k_BSKD", "v_BSKD")}
        reader["q_BSHD"] = torch.randn_like(given["q_BSHD"])
        of_reader = attend_shared(made, request["parts"])
        told["reader"], _ = compared(SharedAttention, of_reader, reader)
    return told


def generate(request: dict[str, Any]) -> dict[str, Any]:
    """What an artifact writes by its kernels and by the reference, and what loading it warned of."""
    options = {"max_new_tokens": request["new"], "ignore_eos": True}
    chunk = request.get("chunk", 512)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", einfold.errors.ArtifactWarning)
        model = einfold.load(request["artifact"], chunk=chunk, trust=request.get("trust", False))
    told = [
        str(w.message) for w in caught if issubclass(w.category, einfold.errors.ArtifactWarning)
    ]
    reference = einfold.load(request["artifact"], engine="reference", chunk=chunk)
    found, expected = (
        [row.tokens for row in each.generate_batch(request["prompts"], **options)]
        for each in (model, reference)
    )
    assert model.engine.cache is not None
    buffers = model.engine.cache.buffers.values()
    return {
        "found": found,
        "expected": expected,
        "warnings": told,
        "tensors": all(isinstance(buffer, Tensor) for buffer in buffers),
    }


def in_arena(request: dict[str, Any]) -> dict[str, Any]:
    """Steps of an artifact whose shapes are met twice, the same captured and replayed, and the same with all
    allocated, over caches of their own: whether they give the same bits, and what torch asked for in steps of
    one token a row."""
    logits: dict[str, list[Tensor]] = {"arena": [], "captured": [], "allocated": []}
    allocated: list[int] = []
    kept: list[tuple[Any, Any]] = []
    graphs = SimulatedGraphs()
    for how in logits:
        model = einfold.load(request["artifact"], chunk=16)
        runner: Any = model.engine.runner
        if how == "allocated":
            runner._worth_a_plan = lambda inputs: False
        if how == "captured":
            runner._arena._capture = graphs
        run = runner._run

        def watched(arrays: Any, others: Any, run: Any = run, how: str = how) -> Any:
            with asked() as sizes:
                out = run(arrays, others)
            logits[how].append(out["logits"].clone())
            if how == "arena" and arrays["input_ids"].shape[1] == 1:
                allocated.append(len(sizes))
            return out

        def keeping(*given: Any, step: Any = runner.step) -> Any:
            kept.append((found := step(*given), found.copy()))
            return found

        runner._run, runner.step = watched, keeping
        options = {"max_new_tokens": request["new"], "ignore_eos": True}
        for _ in range(3):  # meets shapes, plans for them, knows them
            allocated.clear()
            model.generate_batch(request["prompts"], **options)
        if how == "arena":
            found = {"arena": runner._arena.nbytes, "allocated": [*allocated]}
    same = [
        torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*logits.values(), strict=True)
    ]
    kept_so = all((a == b).all() for a, b in kept)
    return {"same": same, "kept": kept_so, "replayed": graphs.replayed, **found}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    if request.get("what") == "arena":
        return in_arena(request)
    return generate(request) if "artifact" in request else kernel_error(request)


if __name__ == "__main__":
    serve(answer)
