"""Scales of input channels: a column that meets large inputs is stored larger, and so with less error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ir.quant.scheme import Scheme
from .round_to_nearest import RoundToNearest
from .solver import Solver

#: Powers of a channel's size that are tried: 0 to 0.95.
_POWERS = tuple(step / 20 for step in range(20))

#: Rows of a weight that the search looks at.
_ROWS = 512

#: Channels smaller than this share of the largest are taken for as large as that.
_SMALLEST = 1e-4


class ScalesChannels(Solver):
    """Base of solvers that scale channels by `channel_scales`."""

    observes = ("input_moments",)

    @property
    def scales_channels(self) -> bool:
        return True

    def channels(
        self, weight: Tensor, scheme: Scheme, statistics: Mapping[str, Tensor]
    ) -> Tensor | None:
        return channel_scales(weight, scheme, statistics["moment"])


def channel_scales(weight_NM: Tensor, scheme: Scheme, moment_MM: Tensor) -> Tensor | None:
    """Factors [M] for a weight's columns, by which its inputs are divided; None where 1 is the best.

    They are a power of each channel's size, the root of its mean square; of all powers the one is taken with
    which the product's error is least, the weight rounded to nearest. Infinite where a moment is.

    Source: AWQ (Lin et al. 2023, section 3.2 and equations 4 and 5), where a channel's size is its mean
    magnitude.
    """
    rows_RM = weight_NM[:: max(1, len(weight_NM) // _ROWS)].float()
    size = moment_MM.diagonal().sqrt()
    size = size.clamp(min=float(size.max()) * _SMALLEST)
    best, least = None, float("inf")
    for power in _POWERS:
        scales = size.pow(power)
        scales = scales / (scales.max() * scales.min()).sqrt()
        stored = RoundToNearest().solve(rows_RM * scales, scheme, {})
        off_RM = scheme.dequantize(stored.pieces, rows_RM.shape[1]) / scales - rows_RM
        loss = float(((off_RM @ moment_MM) * off_RM).sum(dtype=torch.float64))
        if loss < least:
            best, least = scales if power else None, loss
    return best
