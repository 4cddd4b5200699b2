"""The product's own observers go through what holds for every observer."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from einfold.compiler.calibrate.observer import OBSERVERS
from einfold.compiler.calibrate.observers.channel_orders import ChannelOrders, order_of
from einfold.compiler.calibrate.observers.head_bases import HeadBases
from einfold.compiler.calibrate.observers.input_moments import InputMoments
from einfold.compiler.calibrate.observers.kv_bases import KVBases
from einfold.compiler.calibrate.observers.retaining import RetainingHeads
from einfold.compiler.calibrate.observers.retrieval_heads import RetrievalHeads

from ..programs import program
from . import common

OWN: dict[str, common.Make] = {
    **OBSERVERS,
    "kv_bases": lambda: KVBases({"layer-0.key": 3, "layer-1.value": 5}),
    "retrieval_heads": lambda: RetrievalHeads(6),
    "retaining": lambda: RetainingHeads((0, 1), 8, steps=30),
    "head_bases": lambda: HeadBases({0: None, 1: None}, steps=30),
    "channel_orders": lambda: ChannelOrders(4, 2),
}


@pytest.mark.parametrize("name", list(OWN))
def test_what_holds_for_every_observer(name: str, tmp_path: Path) -> None:
    common.check_found(OWN[name])
    common.check_kept(OWN[name], tmp_path / "kept")
    common.check_asked(OWN[name], tmp_path / "asked")
    common.check_refused(OWN[name])


@pytest.mark.parametrize("width", [5, 64, 77])
def test_moments_are_the_mean_of_products(width: int) -> None:
    """They are computed in parts, whether these divide the width or not."""
    own, original = torch.randn(2, 3, 20, width, generator=torch.Generator().manual_seed(0))
    (site, *_) = InputMoments().sites(program(common.BODY))
    found = InputMoments().see(replace(site, embeds=False), own, original)
    x, o = (each.flatten(0, 1).double() for each in (own, original))
    assert torch.equal(found["moment"], found["moment"].T)
    torch.testing.assert_close(found["moment"].double(), x.T @ x / 60, rtol=1e-5, atol=1e-6)
    drift = (o - x).T @ x / 60
    torch.testing.assert_close(found["drift"].double(), drift, rtol=1e-5, atol=1e-6)
    weight = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    found = InputMoments().see(replace(site, embeds=False), own, original, weight)
    assert "drift" not in found
    drifted = weight.double() @ drift
    torch.testing.assert_close(found["drifted"].double(), drifted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_an_order_is_near_the_best_partition_of_channels(seed: int) -> None:
    """Beside all 35 of 8 channels in two blocks of 4."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(8, 1, generator=generator) ** 3 * 10
    squares = (torch.randn(8, 40, generator=generator) * spread).square()
    weight = torch.rand(8, generator=generator)

    def cost(order: list[int]) -> float:
        halves = (order[:4], order[4:])
        return sum(float(weight[half].sum() * squares[half].amax(0).mean()) for half in halves)

    every = [
        [0, *rest, *(d for d in range(8) if d not in (0, *rest))]
        for rest in combinations(range(1, 8), 3)
    ]
    found = order_of(squares, weight, 4).tolist()
    assert sorted(found) == list(range(8))
    assert cost(found) <= min(1.05 * min(map(cost, every)), cost([*range(8)]))
    assert sorted(found[:4]) == found[:4] and sorted(found[4:]) == found[4:]
