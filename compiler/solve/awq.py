"""AWQ: columns that meet large inputs are scaled up before they are rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..ir.quant.scheme import Scheme
from .channels import ScalesChannels
from .round_to_nearest import RoundToNearest
from .solver import SOLVERS, Solved


@SOLVERS.register
@dataclass(frozen=True)
class AWQ(ScalesChannels):
    """Scales input channels by a power of their size that a search finds, then rounds to nearest. The norm
    in front of a linear divides by the scales; where no norm is read by it alone, it is rounded as it is.
    Inputs are those of the original model.

    Source: AWQ (Lin et al. 2023, section 3.2). Different from it: each linear has its own scales (queries,
    keys and values are one), none are folded into another linear's rows, and no weight is clipped.
    """

    name = "awq"

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Mapping[str, Tensor]) -> Solved:
        return RoundToNearest().solve(weight, scheme, statistics)
