"""decoupleQ: codes and scales of a weight are decided in turn, each the best for the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..ir.quant.scheme import Scheme
from .gptq import COLUMNS, GPTQ, Feedback, in_columns
from .solver import SOLVERS, Choice, Grid, without_scales

#: Added to the diagonal of the scales' equations, as a share of its mean.
_RIDGE = 0.001


@SOLVERS.register
@dataclass(frozen=True)
class DecoupleQ(GPTQ):
    """Begins with what `gptq` gives. Then, `rounds` times: the scales that with these codes have the least
    error in products, by least squares over all groups of a row; and with those the codes, column by column,
    each the best beside all others as they stand. No row ever gets worse.

    Source: decoupleQ (Guo et al. 2024, sections 3.2 and 3.3). Different from it: zero points are codes, and
    stay as they are; codes are improved one by one (coordinate descent, as in QuantEase, Behdin et al. 2023)
    where the paper relaxes them; and blocks are not tuned as a whole.
    """

    rounds: int = 2

    name = "decoupleq"

    def refuses(self, scheme: Scheme) -> str:
        return without_scales(self.name, scheme)

    def choice(self, scheme: Scheme, moment_MM: Tensor, feedback: Feedback) -> Choice:
        begin = super().choice(scheme, moment_MM, feedback)
        product = Product(moment_MM, feedback.order, scheme)

        def choose(groups_RGB: Tensor) -> tuple[Tensor, Grid]:
            codes, grid = begin(groups_RGB)
            if not self.rounds:
                return codes, grid
            felt = product.felt(groups_RGB, scheme.values(codes, grid))
            for _ in range(self.rounds):
                grid, felt = product.scaled(groups_RGB, codes, grid, felt)
                codes, felt = product.coded(groups_RGB, codes, grid, felt)
            return codes, grid

        return choose


class Product:
    """What rows lose in a product: e H eᵀ of what a row misses, e, and of the moments H of its inputs.

    What is felt of that, e H [R, M], is handed on from step to step, for it is a product with all moments.
    """

    def __init__(self, moment_MM: Tensor, order: Tensor, scheme: Scheme) -> None:
        self.moment, self.order, self.scheme = moment_MM, order, scheme

    def felt(self, groups_RGB: Tensor, values_RGB: Tensor) -> Tensor:
        """What is felt of what values miss, [R, M]."""
        return self._missed(groups_RGB, values_RGB) @ self.moment

    def scaled(
        self, groups_RGB: Tensor, codes: Tensor, grid: Grid, felt_RM: Tensor
    ) -> tuple[Grid, Tensor]:
        """The grid with the scales that fit the codes best, and what is felt then; a row keeps its own where
        theirs, settled, are no better."""
        rows, count, size = groups_RGB.shape
        scheme, width = self.scheme, len(self.moment)
        values = scheme.values(codes, grid)
        # What values grow by as their scale grows by 1: some schemes have weights that no scale moves.
        twice = scheme.values(codes, {**grid, "scales": 2 * grid["scales"]})
        levels = ((twice - values) / grid["scales"]).flatten(1)[:, :width]

        def by_group(products_RM: Tensor, first: int = 0) -> Tensor:
            groups = count - first
            padded = functional.pad(products_RM, (0, groups * size - products_RM.shape[1]))
            sums: Tensor = padded.unflatten(1, (groups, size)).sum(-1)
            return sums

        missed = self._missed(groups_RGB, values)
        wanted = by_group(felt_RM * levels)
        normal = torch.empty(rows, count, count)
        for group in range(count):  # what is before a group is known by then, for all is symmetric
            start, stop = (min(width, edge * size) for edge in (group, group + 1))
            own = levels[:, start:stop] @ self.moment[start:stop, start:]
            normal[:, group, group:] = by_group(own * levels[:, start:], group)
            normal[:, group + 1 :, group] = normal[:, group, group + 1 :]
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal += diagonal.mean(1, keepdim=True) * _RIDGE + torch.finfo(torch.float32).tiny
        step = torch.linalg.solve(normal.double(), wanted.double()).float()[..., None]
        moved = grid["scales"] + step
        moved = torch.where(moved * grid["scales"] > 0, moved, grid["scales"])
        found = scheme.settle({**grid, "scales": moved})
        fewer = self._missed(groups_RGB, scheme.values(codes, found))
        felt = fewer @ self.moment
        better = (felt * fewer).sum(-1) < (felt_RM * missed).sum(-1)
        chosen = {
            name: torch.where(better[:, None, None], at, grid[name])
            if len(at) == rows  # else it is of all rows, and stands
            else at
            for name, at in found.items()
        }
        return chosen, torch.where(better[:, None], felt, felt_RM)

    def coded(
        self, groups_RGB: Tensor, codes: Tensor, grid: Grid, felt_RM: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The codes after each column took the best one, in turn, and what is felt then."""
        scheme, order = self.scheme, self.order
        wide = in_columns(grid, groups_RGB, order)
        values_MR = scheme.values(codes, grid).flatten(1)[:, order].T.contiguous()
        moment = self.moment[order][:, order]
        felt_MR = felt_RM[:, order].T.contiguous()
        flat = codes.flatten(1).clone()
        found_MR = flat[:, order].T.contiguous()
        width = len(moment)
        for start in range(0, width, COLUMNS):
            stop = min(start + COLUMNS, width)
            moved = torch.empty_like(felt_MR[start:stop])
            for column in range(start, stop):
                part = {name: each[column, :, None, None] for name, each in wide.items()}
                wanted = values_MR[column] + felt_MR[column] / moment[column, column]
                code = scheme.nearest(wanted[:, None, None], part)
                found_MR[column] = code[:, 0, 0]
                moved[column - start] = scheme.values(code, part)[:, 0, 0] - values_MR[column]
                felt_MR[start:stop].addr_(
                    moment[start:stop, column], moved[column - start], alpha=-1
                )
            felt_MR[:start].addmm_(moment[:start, start:stop], moved, alpha=-1)
            felt_MR[stop:].addmm_(moment[stop:, start:stop], moved, alpha=-1)
        flat[:, order] = found_MR.T
        felt = torch.empty_like(felt_RM)
        felt[:, order] = felt_MR.T
        return flat.reshape(codes.shape), felt

    def _missed(self, groups_RGB: Tensor, values_RGB: Tensor) -> Tensor:
        return (groups_RGB - values_RGB).flatten(1)[:, : len(self.moment)]
