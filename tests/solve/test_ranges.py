"""Ranges of groups: never worse than whole ones by what was asked for, and whole where these are best."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.quant.scheme import Scheme
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.quant.schemes.microscaling import NVFP4
from einfold.compiler.ir.quant.schemes.spqr import SpQR
from einfold.compiler.solve.ranges import fitted

from ..quant.test_schemes import OWN


def off(groups: Tensor, scheme: Scheme, grid: dict[str, Tensor], importance: Tensor) -> Tensor:
    """What groups miss, each column times its importance, [R, G]."""
    missed = groups - scheme.values(scheme.nearest(groups, grid), grid)
    weights = torch.nn.functional.pad(importance, (0, groups[0].numel() - len(importance)))
    return (missed.square() * weights.reshape(groups.shape[1:])).sum(-1)


@pytest.mark.parametrize("scheme", [scheme for scheme in OWN if scheme.by_itself], ids=str)
def test_what_counts_is_missed_by_less(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(30, 72, generator=generator)
    rows[::3, 7] = 3.5  # the outlier meets inputs that are next to nothing
    importance = torch.rand(72, generator=generator) + 0.5
    importance[7] = 1e-3
    groups = scheme.groups(rows)
    grid = dict(fitted(groups, scheme, importance))
    assert all(torch.equal(at, scheme.settle(grid)[name]) for name, at in grid.items())
    found = off(groups, scheme, grid, importance)
    whole = off(groups, scheme, scheme.settle(scheme.grid(groups)), importance)
    assert float(found.sum()) <= float(whole.sum())
    # Scales that share a unit are settled together, and may come out otherwise than each was tried alone.
    if isinstance(scheme, Grouped) and scheme.scales != "q8":
        assert bool((found <= whole * (1 + 1e-5)).all())
        if scheme.bits <= 4:
            assert float(found[::3, 0].sum()) < 0.9 * float(whole[::3, 0].sum())


def test_outliers_that_meet_large_inputs_are_set_apart() -> None:
    """The same weights are outliers in two columns; one of these meets what is 100 times as large."""
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    rows[:, 3], rows[:, 20] = 8.0, 12.0
    scheme, importance = SpQR(outliers=1 / 64), torch.ones(64)
    groups = scheme.groups(rows)
    assert bool(scheme.grid(groups)["outlier"].flatten(1)[:, 20].all())
    importance[:16] = 100.0
    chosen = fitted(groups, scheme, importance)["outlier"].flatten(1)
    assert bool(chosen[:, 3].all()) and int(chosen.sum()) == 8


def test_a_range_that_is_met_exactly_stays() -> None:
    rows = torch.tensor([[0.0, 1.0, 2.0, 3.0] * 4])
    scheme = Grouped(2, 16, symmetric=False)
    grid = fitted(scheme.groups(rows), scheme, torch.ones(16))
    assert float(grid["scales"]) == 1.0 and float(grid["zeros"]) == 0.0


def test_what_all_groups_share_is_that_of_whole_ranges() -> None:
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    groups = NVFP4().groups(rows)
    assert torch.equal(
        fitted(groups, NVFP4(), torch.ones(64))["scale"], NVFP4().grid(groups)["scale"]
    )
