"""GPTQ: columns are rounded one after the other; those that wait take over the errors of those done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.quant.scheme import Scheme
from .channels import ScalesChannels
from .moments import DAMPING, damped, factorised
from .ranges import fitted
from .round_to_nearest import RoundToNearest
from .solver import SOLVERS, Choice, Grid, Solved, by_rows, completed

#: Columns whose errors are handed on together.
COLUMNS = 128

#: Columns of the inverse factor that are computed in float64 at a time.
_INVERTED = 512


@SOLVERS.register
@dataclass(frozen=True)
class GPTQ(ScalesChannels):
    """Rounds column by column; each column's error is spread over those that wait, as the inputs' second
    moments say it is felt least. Columns that weigh most go first (act-order); the grid of each group is
    chosen before, by the weights as they are. Inputs are those of the model whose weights were solved before.

    fit: whether a group's levels may cover less than its range, where the inputs say that less is lost so.
    damping: added to the moments' diagonal, as a share of its mean; raised where that is not enough.
    drift: how far the target moves to what makes up for the inputs' own errors, 0 (GPTQ) to 1 (GPTAQ). On
    few tokens the whole way fits their noise: on SmolLM2-135M in 4 bits and 4,096 tokens, KL is 0.151 with 0,
    0.142 with 0.5, 0.182 with 1.
    balance: whether input channels are scaled first, as AWQ does, where a norm can divide by the scales.

    Source: Frantar et al. 2022 (section 3), with the static groups of its reference code; the drift from
    GPTAQ (Li et al. 2025). Different from it: the target is moved once, by least squares, before columns are
    rounded, where the paper corrects column by column.
    """

    damping: float = DAMPING
    drift: float = 0.5
    balance: bool = True
    fit: bool = True

    name = "gptq"
    follows = True

    @property
    def scales_channels(self) -> bool:
        return self.balance

    def refuses(self, scheme: Scheme) -> str:
        if not scheme.coded.by_itself:
            return f"gptq rounds one weight after the other, and {scheme.coded.name} codes groups as a whole"
        return ""

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Mapping[str, Tensor]) -> Solved:
        moment = statistics.get("moment")
        if moment is None:  # of a table: nothing is known of its inputs
            return RoundToNearest().solve(weight, scheme, statistics)
        feedback = Feedback(moment, self.damping)
        target = weight.float()
        drifted = _drifted(target, statistics) if self.drift else None
        if drifted is not None:
            target = target + self.drift * feedback.made_up(drifted)
        codes = scheme.coded
        choose = self.choice(codes, damped(moment, self.damping), feedback)
        return completed(by_rows(target, codes, choose, weight), scheme, target, moment, weight)

    def choice(self, scheme: Scheme, moment_MM: Tensor, feedback: Feedback) -> Choice:
        """What gives the codes and the grid of some rows; the moments are damped."""

        def choose(groups_RGB: Tensor) -> tuple[Tensor, Grid]:
            if self.fit:
                grid = fitted(groups_RGB, scheme, moment_MM.diagonal())
            else:
                grid = scheme.settle(scheme.grid(groups_RGB))
            return feedback.chosen(groups_RGB, scheme, grid), grid

        return choose


def _drifted(target_NM: Tensor, statistics: Mapping[str, Tensor]) -> Tensor | None:
    """The mean of W (o - x) xᵀ [N, M], of the inputs x that a weight W gets and of o, those of the original;
    None where these are the same."""
    if "drifted" in statistics:
        return statistics["drifted"]
    return target_NM @ statistics["drift"] if "drift" in statistics else None


class Feedback:
    """How the error of a column is felt in those that are rounded later, and the order of the columns.

    `upper` is the factor U of the inverse moments, UᵀU, in that order.
    """

    def __init__(self, moment_MM: Tensor, damping: float) -> None:
        self.order = torch.argsort(moment_MM.diagonal(), descending=True, stable=True)
        turned = self.order.flip(0)
        factor = factorised(moment_MM[turned[:, None], turned], damping)
        width = len(factor)
        self.upper = torch.zeros(width, width)
        # From the last column to the first, the factor of the moments is upper, and U its inverse.
        for start in range(0, width, _INVERTED):
            stop = min(start + _INVERTED, width)
            part = torch.eye(width - start, stop - start, dtype=factor.dtype)
            part = torch.linalg.solve_triangular(factor[start:, start:], part, upper=False)
            self.upper[: width - start, width - stop : width - start] = part.flip(0, 1)

    def made_up(self, products_NM: Tensor) -> Tensor:
        """The change of a weight that adds these products with the moments, by least squares."""
        found = torch.empty_like(products_NM)
        found[:, self.order] = products_NM[:, self.order] @ self.upper.T @ self.upper
        return found

    def chosen(self, groups_RGB: Tensor, scheme: Scheme, grid: Grid) -> Tensor:
        """The codes of some rows on a settled grid."""
        wide = in_columns(grid, groups_RGB, self.order)
        # Columns behind the weight's only fill up its last group: they are 0, and nothing is felt of them.
        codes = scheme.nearest(groups_RGB, grid).flatten(1)
        rest_MR = groups_RGB.flatten(1)[:, self.order].T.contiguous()
        chosen_MR = torch.empty(rest_MR.shape, dtype=codes.dtype)
        width = len(rest_MR)
        for start in range(0, width, COLUMNS):
            stop = min(start + COLUMNS, width)
            errors = torch.empty_like(rest_MR[start:stop])
            for column in range(start, stop):
                part = {name: each[column, :, None, None] for name, each in wide.items()}
                values = rest_MR[column, :, None, None]
                code = scheme.nearest(values, part)
                off = (values - scheme.values(code, part))[:, 0, 0] / self.upper[column, column]
                chosen_MR[column] = code[:, 0, 0]
                errors[column - start] = off
                rest_MR[column:stop].addr_(self.upper[column, column:stop], off, alpha=-1)
            rest_MR[stop:].addmm_(self.upper[start:stop, stop:].T, errors, alpha=-1)
        codes[:, self.order] = chosen_MR.T
        return codes.reshape(groups_RGB.shape)


def in_columns(grid: Grid, groups_RGB: Tensor, order: Tensor) -> dict[str, Tensor]:
    """The grid of each column [M, R], columns in an order and each one's rows side by side."""
    shape = groups_RGB.shape[1:]
    return {
        name: part.expand(-1, *shape).flatten(1)[:, order].T.contiguous()
        for name, part in grid.items()
    }
