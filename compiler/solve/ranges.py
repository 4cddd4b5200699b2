"""What range the levels of a group cover: all of its weights, or less where that loses less."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..ir.quant.scheme import Scheme
from .solver import Grid

#: Shares of the weights' range that are tried beside all of it.
_SHARES = tuple(1 - step / 40 for step in range(1, 17))


def fitted(groups_RGB: Tensor, scheme: Scheme, importance_M: Tensor) -> Grid:
    """A settled grid for groups: each has the share of its range, 0.6 to 1, at which the squares of what
    rounding to nearest misses are least, each times its column's `importance`.

    Only what a grid has by group is chosen so; what groups share, such as a scale of the whole weight, is
    that of whole ranges. Ranges are whole too where a group is coded at once, which is slow, and where its
    outliers are set apart already.
    """
    shape = groups_RGB.shape
    behind = shape[1] * shape[2] - len(importance_M)  # columns that only fill up the last group
    weights_GB = functional.pad(importance_M, (0, behind)).reshape(shape[1:])

    def loss(grid: Grid) -> Tensor:
        settled = scheme.settle(grid)
        missed = groups_RGB - scheme.values(scheme.nearest(groups_RGB, settled), settled)
        return missed.square_().mul_(weights_GB).sum(-1, keepdim=True)

    best = scheme.grid_for(groups_RGB, weights_GB)
    if not scheme.by_itself or any(at.shape == shape for at in best.values()):
        return scheme.settle(best)
    least = loss(best)
    for share in _SHARES:
        narrow = scheme.grid_for(groups_RGB * share, weights_GB)
        tried = {name: narrow[name] if at.shape == least.shape else at for name, at in best.items()}
        found = loss(tried)
        better = found < least
        best = {
            name: torch.where(better, tried[name], at) if at.shape == least.shape else at
            for name, at in best.items()
        }
        least = torch.where(better, found, least)
    return scheme.settle(best)
