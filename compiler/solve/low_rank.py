"""A low-rank correction of what a scheme missed, from the inputs that a weight reads."""

from __future__ import annotations

from torch import Tensor

from ..ir.quant.low_rank import factors


def correction(residual_NM: Tensor, moment_MM: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors left [N, rank] and right [rank, M] of the correction of a residual (the weight less what
    its codes stand for) with the least mean |(residual - left right) x|² over inputs x of second moment
    `moment` = mean of x xᵀ, in float32.

    Closed form. Singular moments, as of channels that are never used, are fine; NaN and infinite ones are
    the caller's to refuse.

    Source: EoRA (Liu et al. 2024, section 3), which takes eigenvectors of the moment as here; LQER (Zhang et
    al. 2024, section 3.2) takes the mean magnitudes of channels, which is this for a diagonal moment of
    their squares.
    """
    return factors(residual_NM, rank, moment_MM)
