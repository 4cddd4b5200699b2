"""AWQ: columns that meet large inputs are scaled up before they are rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..ir.quant.scheme import Scheme
from .channels import ScalesChannels
from .moments import DAMPING, damped
from .ranges import fitted
from .round_to_nearest import RoundToNearest
from .solver import SOLVERS, Grid, Solved, by_rows, completed


@SOLVERS.register
@dataclass(frozen=True)
class AWQ(ScalesChannels):
    """Scales input channels by a power of their size that a search finds, then rounds to nearest. The norm
    in front of a linear divides by the scales; where no norm is read by it alone, it is rounded as it is.
    Inputs are those of the original model.

    fit: whether a group's levels may cover less than its range, where the inputs say that less is lost so.

    Source: AWQ (Lin et al. 2023, section 3.2), and the search for ranges of its code. Different from it: each
    linear has its own scales (queries, keys and values are one), and none are folded into another linear's
    rows; ranges are judged by each channel's mean square, where the code looks at what a product misses.
    """

    fit: bool = True

    name = "awq"

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Mapping[str, Tensor]) -> Solved:
        moment = statistics.get("moment")
        if moment is None or not self.fit:
            return RoundToNearest().solve(weight, scheme, statistics)
        codes, importance_M = scheme.coded, damped(moment, DAMPING).diagonal()

        def chosen(groups_RGB: Tensor) -> tuple[Tensor, Grid]:
            grid = fitted(groups_RGB, codes, importance_M)
            return codes.nearest(groups_RGB, grid), grid

        return completed(by_rows(weight, codes, chosen), scheme, weight, moment, weight)
