"""decoupleQ: codes and scales of a weight are decided in turn, each the best for the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..ir.quant.scheme import Scheme
from .gptq import COLUMNS, GPTQ, Feedback, in_columns
from .solver import SOLVERS, Choice, Grid, without_scales

#: Numbers of the equations of scales that are solved at a time: those of some rows.
_EQUATIONS = 1 << 22

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
        missed = self._missed(groups_RGB, values)
        wanted = _by_group(felt_RM * levels, count, size)
        some = max(1, _EQUATIONS // count**2)
        parts = zip(levels.split(some), wanted.split(some), strict=True)
        step = torch.cat([self._step(*part, size) for part in parts])[..., None]
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

    def _step(self, levels_RM: Tensor, wanted_RG: Tensor, size: int) -> Tensor:
        """How far the scales of some rows go, [R, G], by what values grow by with them."""
        (rows, width), count = levels_RM.shape, wanted_RG.shape[1]
        normal = torch.empty(rows, count, count)
        for group in range(count):  # what is before a group is known by then, for all is symmetric
            start, stop = (min(width, edge * size) for edge in (group, group + 1))
            own = levels_RM[:, start:stop] @ self.moment[start:stop, start:]
            normal[:, group, group:] = _by_group(own * levels_RM[:, start:], count - group, size)
            normal[:, group + 1 :, group] = normal[:, group, group + 1 :]
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal += diagonal.mean(1, keepdim=True) * _RIDGE + torch.finfo(torch.float32).tiny
        found: Tensor = torch.linalg.solve(normal.double(), wanted_RG.double())
        return found.float()

    def coded(
        self, groups_RGB: Tensor, codes: Tensor, grid: Grid, felt_RM: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The codes after each column took the best one, in turn, and what is felt then."""
        scheme, order = self.scheme, self.order
        wide = in_columns(grid, groups_RGB, order)
        values_MR = scheme.values(codes, grid).flatten(1)[:, order].T.contiguous()
        felt_MR = felt_RM[:, order].T.contiguous()
        flat = codes.flatten(1).clone()
        found_MR = flat[:, order].T.contiguous()
        width = len(self.moment)
        for start in range(0, width, COLUMNS):
            stop = min(start + COLUMNS, width)
            moment = self.moment[order[:, None], order[start:stop]]
            moved = torch.empty_like(felt_MR[start:stop])
            for place, column in enumerate(range(start, stop)):
                part = {name: each[column, :, None, None] for name, each in wide.items()}
                wanted = values_MR[column] + felt_MR[column] / moment[column, place]
                code = scheme.nearest(wanted[:, None, None], part)
                found_MR[column] = code[:, 0, 0]
                moved[place] = scheme.values(code, part)[:, 0, 0] - values_MR[column]
                felt_MR[start:stop].addr_(moment[start:stop, place], moved[place], alpha=-1)
            felt_MR[:start].addmm_(moment[:start], moved, alpha=-1)
            felt_MR[stop:].addmm_(moment[stop:], moved, alpha=-1)
        flat[:, order] = found_MR.T
        felt = torch.empty_like(felt_RM)
        felt[:, order] = felt_MR.T
        return flat.reshape(codes.shape), felt

    def _missed(self, groups_RGB: Tensor, values_RGB: Tensor) -> Tensor:
        return (groups_RGB - values_RGB).flatten(1)[:, : len(self.moment)]


def _by_group(products_RM: Tensor, count: int, size: int) -> Tensor:
    """The sums of so many groups of columns, of which the last may be short or have none."""
    padded = functional.pad(products_RM, (0, count * size - products_RM.shape[1]))
    sums: Tensor = padded.unflatten(1, (count, size)).sum(-1)
    return sums
