"""Round to nearest: every weight takes the level that is nearest to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..ir.quant.scheme import Scheme
from .solver import SOLVERS, Grid, Solved, Solver, by_rows


@SOLVERS.register
@dataclass(frozen=True)
class RoundToNearest(Solver):
    """Each group's levels follow its own range. Works on a few rows at a time, in float32.

    Source: the baseline of GPTQ (Frantar et al. 2022, section 4).
    """

    name = "round_to_nearest"

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Mapping[str, Tensor]) -> Solved:
        def chosen(groups_RGB: Tensor) -> tuple[Tensor, Grid]:
            grid = scheme.settle(scheme.grid(groups_RGB))
            return scheme.nearest(groups_RGB, grid), grid

        return by_rows(weight, scheme, chosen)
