"""Choosing pages by a query: Triton kernels, and an operator of torch, which takes the best of a row.

    keys, bounds -> refresh                     where a step writes keys, however many
    query, bounds -> upper -> order             one token alone
    orders -> torch.topk -> the table of pages  which `listed.py` walks

Where a reader wants the pages whose keys are most apart, `order` tells how far those of each are, and another
torch.topk finds them first.

No length is known on the host: rows of other lengths read as many entries of the table as `chosen` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....ir.ops.bounded import BoundedAttention
from ....ir.program import Program, call_arguments
from ..kernel import load_source
from ..starting import start
from .choosing_kinds import ChoosingKind, choosing_kind
from .choosing_source import LAST, STRIDES, choosing_source

#: Numbers of a tile of bounds: two of them are in the registers of four warps.
_TILE = 4096
#: Pages that a program of `order` takes, and slots of a page that one of `refresh` has at a time.
_ORDERED, _SLOTS = 512, 16


@dataclass(frozen=True)
class ChoosingKernel:
    """The kernels of the layers of one kind: "refresh", "upper" and "order"."""

    kind: ChoosingKind
    name: str
    layers: tuple[int, ...]
    source: str
    _loaded: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    functions = ("refresh", "upper", "order")

    def function(self, name: str) -> Any:
        """The Triton function, or what stands for it. Its source is this module's own text."""
        return self._loaded[name] if self._loaded else getattr(load_source(self.source), name)

    def arguments(self, name: str) -> list[str]:
        """The names of a function's arguments, without its constants."""
        strides = list(STRIDES)
        if name == "refresh":
            known = ["keys", "used", "bounds", "new", "slots", "pages"]
            return [*known, "keys_b", "keys_k", "keys_c", *strides]
        if name == "order":
            far = ["bounds", "farthest", *strides] if self.kind.paged.apart else []
            return ["uppers", "tops", "totals", "used", *far, "orders", "chosen", "pages", "tiles"]
        scale = ["key_scale"] if self.kind.scaled else []
        return ["query", *scale, "bounds", "used", "uppers", "tops", "totals", "pages", *strides]

    def constants(self, name: str) -> dict[str, int]:
        """What a launch of a function asks for."""
        shared = {"num_warps": 4, "num_stages": 2}
        if name == "refresh":
            return {"SLOTS": min(_SLOTS, self.kind.paged.page), **shared}
        if name == "order":
            return {"PAGES": _ORDERED, **shared}
        return {"PAGES": max(16, min(128, _TILE // self.kind.lanes)), **shared}

    def launch(self, name: str, grid: tuple[int, ...], named: Mapping[str, Any]) -> None:
        """Launches a function with its arguments, found by their names."""
        given = [named[each] for each in self.arguments(name)]
        start(self.function(name), grid, given, self.constants(name))


def choosing_kernels(program: Program) -> list[ChoosingKernel]:
    """What chooses pages for the attentions of a program, a kernel a kind; none where none does.

    Raises UnsupportedError, naming the layer, for what no kernel does.
    """
    layers: dict[ChoosingKind, list[int]] = {}
    for node in program.nodes(BoundedAttention.overload()):
        layer = int(call_arguments(node)["layer"])
        of_kind = layers.setdefault(choosing_kind(node), [])
        if layer not in of_kind:  # groups of a layer's heads may be of one kind
            of_kind.append(layer)
    return list(_kernels(layers))


def _kernels(layers: Mapping[ChoosingKind, list[int]]) -> Iterator[ChoosingKernel]:
    names: list[str] = []
    for kind, of_kind in layers.items():
        same = names.count(kind.name)
        names.append(kind.name)
        name = f"{kind.name}_{same}" if same else kind.name
        yield ChoosingKernel(kind, name, tuple(of_kind), choosing_source(kind))


def refresh(made: ChoosingKernel, call: BoundedAttention) -> None:
    """The statistics of the pages that new tokens came into, as `choosing.refresh` finds them."""
    new, page = call.q_BSHD.shape[1], made.kind.paged.page
    batch, kv_heads, slots, _ = call.key_cache_BKCD.shape
    grid = ((new + page - 2) // page + 1, batch * kv_heads)
    if new and batch:
        made.launch("refresh", grid, _given(call) | {"new": new, "slots": slots})


def choose(made: ChoosingKernel, call: BoundedAttention, query_BKGD: Tensor) -> dict[str, Tensor]:
    """The table of the pages that one new token of each row reads, and how many of its entries each row has.

    `pages` i32 [B, K, T], best first, T as many as a row of all slots would read; `chosen` i32 [B].
    """
    orders, chosen = ranked(made, call, query_BKGD)
    most = min(orders.shape[2], made.kind.paged.pages(call.slots))
    best = orders.topk(most, dim=-1).values
    return {"pages": (LAST - (best & LAST)).to(torch.int32), "chosen": chosen}


def ranked(
    made: ChoosingKernel, call: BoundedAttention, query_BKGD: Tensor
) -> tuple[Tensor, Tensor]:
    """A number of each page i64 [B, K, P], the larger the sooner it is read; and how many are, i32 [B]."""
    kind, (batch, kv_heads, slots, _) = made.kind, call.key_cache_BKCD.shape
    page, apart = kind.paged.page, kind.paged.apart
    pages = slots // page
    tiles = -(-pages // made.constants("upper")["PAGES"])
    device = query_BKGD.device

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    heads = (batch, kv_heads, kind.group)
    named: dict[str, Any] = _given(call) | {"query": query_BKGD.contiguous(), "pages": pages}
    named |= {"uppers": empty(*heads, pages), "tiles": tiles}
    named |= {"tops": empty(*heads, tiles), "totals": empty(*heads, tiles)}
    named |= {"orders": empty(batch, kv_heads, pages, dtype=torch.int64)}
    named |= {"chosen": empty(batch, dtype=torch.int32)}
    if apart:
        named |= {"farthest": torch.empty_like(named["orders"])}
    if call.key_scale_KD is not None:
        named["key_scale"] = call.key_scale_KD.float().contiguous()
    if batch:
        made.launch("upper", (tiles, batch * kv_heads), named)
        made.launch("order", (-(-pages // _ORDERED), batch * kv_heads), named)
    if apart:
        _raise(named["orders"], named["farthest"], min(apart, pages))
    return named["orders"], named["chosen"]


def _raise(orders: Tensor, farthest: Tensor, count: int) -> None:
    """Gives the farthest pages numbers above all but those of pages that are always read.

    A row without so many has others among them, but reads all of its own, and these come first.
    """
    places = farthest.topk(count, dim=-1).values & LAST
    orders.scatter_(2, LAST - places, (1 << 32) + places)


def _given(call: BoundedAttention) -> dict[str, Any]:
    """What `refresh` and `upper` are given of the cache."""
    keys, bounds = call.key_cache_BKCD, call.bounds_BKPE
    found: dict[str, Any] = {"keys": keys, "bounds": bounds, "pages": bounds.shape[2]}
    found["used"] = call.used_B.to(torch.int32)
    for name, cache, last in (("keys", keys, "c"), ("bounds", bounds, "p")):
        found |= {f"{name}_{rank}": cache.stride(at) for at, rank in enumerate(("b", "k", last))}
    return found
