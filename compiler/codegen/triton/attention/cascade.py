"""The meaning of attention over slots as a cascade: the operator's own, traced, imported and fused as any.

    b rows, s new tokens, k KV heads, g query heads of a KV head, c slots of the cache,
    d size of a key, f size of a value

What the operator does is imported at small sizes of its own, for a rank of one coordinate would be none, and
then given its names and the sizes of a kind. A sink is one more, virtual, slot with a logit and no value.

Storages of packed tokens and of features (`packed.py`, `low_rank.py`) write their cascades as text: what the
operators there do to bytes of several codes, and to groups that share a scale, is no einsum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ....frontend.cascade.imported import Imported
from ....frontend.cascade.meaning import import_meaning
from ....ir.cascade.cascade import Cascade
from ....ir.cascade.parser import parse
from ....ir.cascade.printer import print_cascade, print_number
from ....ir.cascade.verifier import verify
from ....ir.kv.codes.half_bytes import OFFSET
from ....ir.ops.shared import SharedAttention
from ..dtypes import DTYPES
from .kinds import AttentionKind

#: The streamed rank: slots of the cache.
STREAM = "c"

#: What is traced: the inputs with their ranks, and ranks of sizes that a kind fixes, at sizes of the trace.
_INPUTS = {
    "query": "bskgd",
    "key": "bkcd",
    "value": "bkcf",
    "used": "b",
    "count": "bk",
    "sink": "kg",
    "key_scale": "kd",
    "value_scale": "kf",
}
_TRACED = {"b": 2, "k": 3, "g": 5, "d": 7, "f": 11, "s": 13, "c": 17}
_OUTPUTS = {"out": "bskgf", "lse": "bskg"}


def cascade_of(kind: AttentionKind) -> Cascade:
    """The cascade of a kind."""
    sizes = {"k": kind.kv_heads, "g": kind.group, "d": kind.key_size, "f": kind.value_size}
    found = _cascade(replace(kind, kv_heads=0, group=0, key_size=0, value_size=0, page=0))
    ranks = {
        name: replace(rank, extent=str(sizes[name])) if name in sizes else rank
        for name, rank in found.ranks.items()
    }
    made = replace(found, ranks=ranks)
    made = _in_bytes(made) if kind.halved else made
    verify(made)
    return made


def _in_bytes(cascade: Cascade) -> Cascade:
    """The same over codes of 4 bits, each with 8 added and two of neighbouring channels in a byte."""
    lines = print_cascade(cascade).splitlines()
    for part, rank in (("key", "d"), ("value", "f")):
        code = f"{part}[b, k, c, {rank}]"
        apart = f"(bits(shift_right({code}, pos({rank}) % 2 * 4), 15) - {OFFSET})"
        lines = [line if line.startswith("input") else line.replace(code, apart) for line in lines]
    return parse("\n".join(lines))


@cache
def _cascade(kind: AttentionKind) -> Cascade:
    """The same at the sizes of the trace, for a kind whose sizes do not matter."""
    imported = _traced(kind)
    ranks: dict[str, str] = {}
    for bindings, letters in ((imported.inputs, _INPUTS), (imported.outputs, _OUTPUTS)):
        for binding in bindings:
            known = letters[_named(binding.node, imported)]
            for dim, letter in zip(binding.dims, known, strict=True):
                ranks |= dict.fromkeys(dim, letter)
    tensors = {binding.name: binding.node for binding in imported.inputs}
    tensors |= {b.name: name for b, name in zip(imported.outputs, _OUTPUTS, strict=False)}
    extents = {"b": "B", "s": "S", "c": "C"}
    found = imported.cascade
    return Cascade(
        {
            ranks[name]: replace(
                rank, name=ranks[name], extent=extents.get(ranks[name], rank.extent)
            )
            for name, rank in found.ranks.items()
        },
        {
            tensors[name]: replace(
                tensor, name=tensors[name], ranks=tuple(ranks[rank] for rank in tensor.ranks)
            )
            for name, tensor in found.inputs.items()
        },
        tuple(item.renamed(ranks, tensors) for item in found.statements),
        tuple(tensors[name] for name in found.outputs),
        found.dead,
    )


def _named(node: str, imported: Imported) -> str:
    """What an input is called, or the output of this node."""
    outputs = [binding.node for binding in imported.outputs]
    return [*_OUTPUTS][outputs.index(node)] if node in outputs else node


def _traced(kind: AttentionKind) -> Imported:
    mode = FakeTensorMode()
    with mode:
        values: dict[str, Any] = {
            name: torch.empty([_TRACED[rank] for rank in _INPUTS[name]], dtype=dtype)
            for name, dtype in _dtypes(kind)
        }

    def meaning(**given: Tensor) -> tuple[Tensor, ...]:
        sink = given.get("sink")
        call = SharedAttention(
            q_BSHD=given["query"].flatten(2, 3),
            key_cache_BKCD=given["key"],
            value_cache_BKCD=given["value"],
            used_B=given["used"],
            count_BK=given.get("count"),
            sinks_H=None if sink is None else sink.flatten(),
            positions_BS=None,
            cos_PR=None,
            sin_PR=None,
            key_scale_KD=given.get("key_scale"),
            value_scale_KD=given.get("value_scale"),
            layer=0,
            scale=kind.scale,
            window=kind.window,
            softcap=kind.softcap,
            interleaved=False,
        )
        heads = (_TRACED["k"], _TRACED["g"])
        found = (call.run().unflatten(2, heads),)
        return (*found, call.sums().unflatten(2, heads)) if kind.lse else found

    return import_meaning(meaning, values, mode)


def _dtypes(kind: AttentionKind) -> Iterator[tuple[str, torch.dtype]]:
    yield "query", DTYPES[kind.query]
    # Two codes a byte are traced as one, which the byte then stands for.
    cache = torch.int8 if kind.halved else DTYPES[kind.cache]
    yield from dict.fromkeys(("key", "value"), cache).items()
    yield "used", torch.int32
    if kind.counted:
        yield "count", torch.float32
    if kind.sinks:
        yield "sink", DTYPES[kind.query]
    if kind.scaled:
        yield from dict.fromkeys(("key_scale", "value_scale"), torch.float32).items()


def logit_of(score: str, scale: float, softcap: float) -> str:
    """A score times the scale, and capped where there is a cap."""
    logit = f"{score} * {print_number(scale)}"
    if not softcap:
        return logit
    cap = print_number(softcap)
    return f"tanh({logit} / {cap}) * {cap}"


def softmax_of(stream: str) -> list[str]:
    """The statements from logits over a rank to their largest, their powers and the sum of these."""
    return [
        f"top[b, s, k, g] = logit[b, s, k, g, {stream}] :: max({stream})",
        f"power[b, s, k, g, {stream}] = exp(logit[b, s, k, g, {stream}] - top[b, s, k, g])",
        f"total[b, s, k, g] = power[b, s, k, g, {stream}] :: sum({stream})",
    ]
