"""Attention over pages that a query chooses, in Triton's interpreter; started as `worker` is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from einfold.compiler.codegen.triton.attention.bound_pages import attend_bounded
from einfold.compiler.codegen.triton.attention.choosing import ChoosingKernel, choose, ranked
from einfold.compiler.codegen.triton.attention.choosing_kinds import ChoosingKind
from einfold.compiler.codegen.triton.attention.choosing_source import LAST, choosing_source
from einfold.compiler.codegen.triton.attention.kernels import AttentionKernel, attention_kernel
from einfold.compiler.codegen.triton.attention.kinds import AttentionKind
from einfold.compiler.codegen.triton.options import Tiles
from einfold.compiler.ir.kv.read.pages.choosing import statistics_of
from einfold.compiler.ir.kv.read.pages.paged import Paged
from einfold.compiler.ir.kv.read.reader import parse_reader
from einfold.compiler.ir.ops.bounded import BoundedAttention

from . import artifact_worker
from .worker import compared, serve


def arguments(kind: AttentionKind, request: dict[str, Any]) -> dict[str, Any]:
    """Random arguments of `bounded_attention`; with `ties` every third page has the same keys.

    New keys are `loud` times as large, so that their page has most of a head's share. Statistics are
    those of whole pages, and anything elsewhere.
    """
    reader, used, slots = parse_reader(request["read"]), request["used"], request["slots"]
    assert isinstance(reader, Paged)
    given = artifact_worker.arguments(kind, request["new"], slots, used)
    if request.get("ties"):
        repeated = torch.arange(slots) % (3 * reader.bounded)
        given["key_cache_BKCD"] = given["key_cache_BKCD"][:, :, repeated]
    given["k_BSKD"] = given["k_BSKD"] * request.get("loud", 1.0)
    keys, page = given["key_cache_BKCD"], reader.page
    numbers = reader.bound_numbers(kind.key_size)
    bounds = torch.full((len(used), kind.kv_heads, slots // page + 1, numbers), 50).to(keys.dtype)
    for row, length in enumerate(used):
        whole = length // page
        bounds[row, :, :whole] = statistics_of(reader, keys[row, None, :, : whole * page])[0]
    return given | {"bounds_BKPE": bounds, "read": request["read"]}


def kernels(
    kind: AttentionKind, read: str
) -> tuple[AttentionKernel, AttentionKernel, ChoosingKernel]:
    """Those of all slots, of pages, and of the choice."""
    reader = parse_reader(read)
    assert isinstance(reader, Paged)
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
    query = query_of(made, call)
    table, page = choose(made, call, query[:, 0]), made.kind.paged.page
    entry = torch.arange(table["pages"].shape[2])
    listed = (entry < table["chosen"][:, None])[:, None].expand(table["pages"].shape)
    pages = torch.zeros(*listed.shape[:2], call.slots // page, dtype=torch.bool)
    pages.scatter_(2, table["pages"].long(), listed)
    visible = call._visible()
    q_BKGSD = query.permute(0, 2, 3, 1, 4) * call.scale
    wanted = call.chosen(made.kind.paged, q_BKGSD, call.key_cache_BKCD, visible)[:, :, 0]
    return pages.repeat_interleave(page, 2) & visible, wanted


def score_error(made: ChoosingKernel, call: BoundedAttention) -> float:
    """The largest error of the scores of pages in use that are not always read, against float64."""
    orders, _ = ranked(made, call, query_of(made, call)[:, 0])
    bits = orders >> 32
    found = torch.where(bits < 0, bits ^ LAST, bits).to(torch.int32).view(torch.float32)
    reader, query = made.kind.paged, query_of(made, call)[:, 0].double() * call.scale
    if call.key_scale_KD is not None:
        query = query * call.key_scale_KD[:, None]
    bounds = call.bounds_BKPE[:, :, : orders.shape[2]].double()
    upper = reader.statistic.asked(query[:, :, :, None])[:, :, :, 0] @ bounds.mT
    pages = (call.used_B[:, None] + reader.page) // reader.page
    place = torch.arange(orders.shape[2])
    upper = upper.masked_fill((place >= pages)[:, None, None], -torch.inf)
    error = (upper.log_softmax(-1).amax(2) - found).abs()
    counts = ((place > 0) & (place < pages - 2))[:, None] & (found <= 0)  # not the farthest
    return float(error.masked_fill(~counts, 0).max())


def query_of(made: ChoosingKernel, call: BoundedAttention) -> Tensor:
    """Turned queries [B, S, K, G, D]."""
    return call.turned_query().unflatten(2, (made.kind.kv_heads, made.kind.group))


def close(found: Tensor, wanted: Tensor) -> bool:
    """Equal, or what sums of another order make of a statistic of up to 127: 2 ** -20 of that, or a bit of
    its own type."""
    if not found.is_floating_point():
        return torch.equal(found, wanted)
    ulp = torch.finfo(found.dtype).eps
    return torch.allclose(found, wanted, rtol=2 * ulp, atol=127 * 2**-20)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The error against the operator, whether both wrote the same slots and bounds, and chose the same."""
    kind = AttentionKind(**request["kind"])
    made = kernels(kind, request["read"])
    given = arguments(kind, request)
    attend = attend_bounded(*made, parts=request["parts"])
    equal = close if made[2].kind.paged.widens else torch.equal
    error, same = compared(BoundedAttention, attend, given, equal)
    told = {"error": error, "same caches": same}
    if request["new"] == 1:
        call = BoundedAttention(**given)  # with the caches as `compared` left them
        found, wanted = chosen(made[2], call)
        told["score error"] = score_error(made[2], call)
        told |= {"same choice": torch.equal(found, wanted), "read": wanted.sum(2)[:, 0].tolist()}
    return told


if __name__ == "__main__":
    serve(answer)
