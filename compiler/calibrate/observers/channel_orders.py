"""In which order a head's channels lose little where blocks of them share an exponent."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...ir.program import Program
from .. import sites
from ..observer import OBSERVERS, Found, Observer
from ..sites import Site

#: Exchanges that are tried, for each channel of a head.
_TRIES = 6


@OBSERVERS.register
class ChannelOrders(Observer):
    """`key` and `value` [K, D]: the channels of each KV head, so many `together` in a block.

    A channel's error goes with the step of its block, and that with the block's largest number; what a logit
    makes of it goes with the query. So the sum over blocks is made small of

        (mean squares of the queries, summed over the block's channels) * (mean of the largest square of keys)

    by exchanges of two channels of different blocks, from the order that they have. Queries and keys are as
    they are turned; the `first` tokens of each row are left out. Values count the same in every channel.
    Only the `parts` that are named are looked at, in these `layers`, or in all.
    """

    name = "channel_orders"

    def __init__(
        self,
        together: int,
        first: int,
        parts: Sequence[str] = ("key", "value"),
        layers: Collection[int] | None = None,
    ) -> None:
        self.together, self.first = together, first
        self.parts, self.layers = tuple(parts), layers

    @property
    def key(self) -> str:
        layers = "all" if self.layers is None else "+".join(map(str, sorted(self.layers)))
        return f"{self.name}-{self.together}-{self.first}-{'+'.join(self.parts)}-{layers}"

    def sites(self, program: Program) -> list[Site]:
        wanted = None if self.layers is None else {sites.layer(layer) for layer in self.layers}
        every = [replace(site, attention=None) for site in sites.attention(program)]
        return [site for site in every if wanted is None or site.name in wanted]

    def see(self, site: Site, *values: Any) -> Found:
        q_BSHD, k_BSKD, v_BSKD = (x[:, self.first :].float() for x in values)
        heads, found = k_BSKD.shape[2], dict[str, Tensor]()
        if "key" in self.parts:
            weight_KD = q_BSHD.square().unflatten(2, (heads, -1)).mean(dim=(0, 1, 3))
            found["key"] = self._orders(k_BSKD, weight_KD)
        if "value" in self.parts:
            found["value"] = self._orders(v_BSKD, torch.ones(heads, v_BSKD.shape[3]))
        return found

    def _orders(self, x_BSKD: Tensor, weight_KD: Tensor) -> Tensor:
        squares_KDT = x_BSKD.square().flatten(0, 1).permute(1, 2, 0).contiguous()
        pairs = zip(squares_KDT, weight_KD, strict=True)
        return torch.stack([order_of(squares, weight, self.together) for squares, weight in pairs])


def order_of(squares_DT: Tensor, weight_D: Tensor, block: int) -> Tensor:
    """An order [D] of channels with these squares for each token, by how much their errors count; within a
    block they stay as they stood."""
    size = len(squares_DT)
    block_D = torch.arange(size) // block

    def cost(number: int, block_D: Tensor) -> float:
        own = block_D == number
        return float(weight_D[own].sum() * squares_DT[own].amax(0).mean())

    costs = [cost(number, block_D) for number in range(size // block)]
    generator = torch.Generator().manual_seed(0)
    for one, two in torch.randint(size, (_TRIES * size, 2), generator=generator).tolist():
        a, b = int(block_D[one]), int(block_D[two])
        if a == b:
            continue
        other_D = block_D.clone()
        other_D[one], other_D[two] = b, a
        changed = cost(a, other_D), cost(b, other_D)
        if sum(changed) < costs[a] + costs[b]:
            block_D, (costs[a], costs[b]) = other_D, changed
    return block_D.argsort(stable=True)
