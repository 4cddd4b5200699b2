"""Attention over pages that a query chooses, in Triton's interpreter; started as `worker` is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from einfold.compiler.codegen.triton.attention.bound_pages import attend_bounded
from einfold.compiler.codegen.triton.attention.choosing import (
    ChoosingKernel,
    ChoosingKind,
    choose,
)
from einfold.compiler.codegen.triton.attention.choosing_source import choosing_source
from einfold.compiler.codegen.triton.attention.kernels import AttentionKernel, attention_kernel
from einfold.compiler.codegen.triton.attention.kinds import AttentionKind
from einfold.compiler.codegen.triton.options import Tiles
from einfold.compiler.ir.kv.read.quest.reader import Quest
from einfold.compiler.ir.kv.read.reader import parse_reader
from einfold.compiler.ir.ops.bounded import BoundedAttention

from . import artifact_worker
from .worker import compared, serve


def arguments(kind: AttentionKind, request: dict[str, Any]) -> dict[str, Any]:
    """Random arguments of `bounded_attention`, or of small whole numbers, so that many pages score alike.

    Bounds are right for the pages in use, but for the one that the next token comes into, and anything else
    elsewhere.
    """
    reader, used, slots = parse_reader(request["read"]), request["used"], request["slots"]
    given = artifact_worker.arguments(kind, request["new"], slots, used)
    if request.get("ties"):
        given["q_BSHD"], given["k_BSKD"] = (given[name].round() for name in ("q_BSHD", "k_BSKD"))
        given["key_cache_BKCD"] = given["key_cache_BKCD"].round()
        given |= {"positions_BS": None, "cos_PR": None, "sin_PR": None, "scale": 0.25}
    keys, page = given["key_cache_BKCD"], reader.bounded
    bounds = torch.full((len(used), kind.kv_heads, slots // page + 1, 2 * kind.key_size), 50.0)
    for row, length in enumerate(used):
        for at in range(length // page):
            of_page = keys[row, :, page * at : page * (at + 1)].float()
            bounds[row, :, at] = torch.cat((of_page.amax(1), of_page.amin(1)), -1)
    return given | {"bounds_BKPE": bounds.to(keys.dtype), "read": request["read"]}


def kernels(
    kind: AttentionKind, read: str
) -> tuple[AttentionKernel, AttentionKernel, ChoosingKernel]:
    """Those of all slots, of pages, and of the choice."""
    reader = parse_reader(read)
    assert isinstance(reader, Quest)
    made = []
    for each in (kind, replace(kind, page=reader.page)):
        one = attention_kernel(each, "tested", (0,), 64)
        small = Tiles(16, 16)
        made.append(replace(one, decode=small, kernel=replace(one.kernel, tiles=small)))
    chooses = ChoosingKind(
        kind.kv_heads, kind.group, kind.key_size, kind.scale, kind.query, kind.cache, kind.scaled, read
    )  # fmt: skip
    return made[0], made[1], ChoosingKernel(chooses, "tested", (0,), choosing_source(chooses))


def chosen(made: ChoosingKernel, call: BoundedAttention) -> tuple[Tensor, Tensor]:
    """Which slots [B, K, C] the newest token reads by the kernels and by the reader; its keys are written."""
    query = call.turned_query().unflatten(2, (made.kind.kv_heads, made.kind.group))
    table, page = choose(made, call, query[:, 0]), made.kind.quest.page
    entry = torch.arange(table["pages"].shape[2])
    listed = (entry < table["chosen"][:, None])[:, None].expand(table["pages"].shape)
    pages = torch.zeros(*listed.shape[:2], call.slots // page, dtype=torch.bool)
    pages.scatter_(2, table["pages"].long(), listed)
    visible = call._visible()
    q_BKGSD = query.permute(0, 2, 3, 1, 4) * call.scale
    wanted = call.chosen(made.kind.quest, q_BKGSD, call.key_cache_BKCD, visible)[:, :, 0]
    return pages.repeat_interleave(page, 2) & visible, wanted


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The error against the operator, whether both wrote the same slots and bounds, and chose the same."""
    kind = AttentionKind(**request["kind"])
    made = kernels(kind, request["read"])
    given = arguments(kind, request)
    error, same = compared(BoundedAttention, attend_bounded(*made, parts=request["parts"]), given)
    told = {"error": error, "same caches": same}
    if request["new"] == 1:
        found, wanted = chosen(made[2], BoundedAttention(**given))  # as `compared` left them
        told |= {"same choice": torch.equal(found, wanted), "read": wanted.sum(2)[:, 0].tolist()}
    return told


if __name__ == "__main__":
    serve(answer)
