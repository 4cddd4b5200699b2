"""HQQ: half-quadratic quantization of scales, which needs no text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.quant.scheme import Scheme
from .solver import SOLVERS, Grid, Solved, Solver, by_rows, completed, without_scales


@SOLVERS.register
@dataclass(frozen=True)
class HQQ(Solver):
    """Moves the scale of each group, in turn with its codes, to where few weights are far from their levels:
    a difference counts by its power `norm` below 1, so that outliers do not pull the grid. A group keeps the
    best of the scales that were tried, its range's among them. Needs no text.

    steps: how often scales are moved. penalty: what a difference that is set apart as an outlier costs, in
    units of the group's steps; it grows by `growth` each time.

    Source: HQQ (Badri and Shaji 2023), with its shrinkage operator. Different from it: scales move, by least
    squares, where the paper moves zero points, which are integers here.
    """

    steps: int = 20
    norm: float = 0.7
    penalty: float = 10.0
    growth: float = 1.01

    name = "hqq"

    def refuses(self, scheme: Scheme) -> str:
        return without_scales(self.name, scheme)

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Mapping[str, Tensor]) -> Solved:
        codes = scheme.coded
        solved = by_rows(weight, codes, lambda groups: self._chosen(groups, codes))
        return completed(solved, scheme, weight, None, weight)

    def _chosen(self, groups_RGB: Tensor, scheme: Scheme) -> tuple[Tensor, Grid]:
        moving = scheme.grid(groups_RGB)
        best = scheme.settle(moving)
        least = self._loss(groups_RGB, scheme, best)
        penalty = self.penalty
        for _ in range(self.steps):
            moving = self._moved(groups_RGB, scheme, moving, penalty)
            loss = self._loss(groups_RGB, scheme, scheme.settle(moving))
            scales = torch.where(loss < least, moving["scales"], best["scales"])
            best, least = {**best, "scales": scales}, torch.minimum(loss, least)
            penalty *= self.growth
        best = scheme.settle(best)
        return scheme.nearest(groups_RGB, best), best

    def _moved(
        self, groups_RGB: Tensor, scheme: Scheme, grid: Grid, penalty: float
    ) -> dict[str, Tensor]:
        """The grid with the scales that fit the codes best, once outliers are set apart."""
        settled = scheme.settle(grid)
        values = scheme.values(scheme.nearest(groups_RGB, settled), settled)
        off = (groups_RGB - values) / settled["scales"]
        size = off.abs()
        apart = off.sign() * (size - size.clamp(min=1e-6).pow(self.norm - 1) / penalty).clamp(min=0)
        levels = values / settled["scales"]
        wanted = groups_RGB - apart * settled["scales"]
        power = levels.square().sum(-1, keepdim=True)
        fitted = (wanted * levels).sum(-1, keepdim=True) / power
        scales = torch.where(
            (power > 0) & (fitted * settled["scales"] > 0), fitted, settled["scales"]
        )
        return {**grid, "scales": scales}

    def _loss(self, groups_RGB: Tensor, scheme: Scheme, grid: Grid) -> Tensor:
        values = scheme.values(scheme.nearest(groups_RGB, grid), grid)
        return (groups_RGB - values).abs().pow(self.norm).sum(-1, keepdim=True)
