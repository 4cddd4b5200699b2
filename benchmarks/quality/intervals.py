"""How sure figures of few questions and few windows are: 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

#: Of a normal distribution 95 % lie within so many standard deviations.
_DEVIATIONS = 1.959964

#: Draws of a bootstrap.
_DRAWS = 10_000


def of_share(found: int, asked: int) -> tuple[float, float]:
    """Where the share of a yes is, of which `found` of `asked` were seen: Wilson's score interval (1927)."""
    square, share = _DEVIATIONS**2, found / asked
    middle = (share + square / (2 * asked)) / (1 + square / asked)
    half = math.sqrt(share * (1 - share) / asked + square / (4 * asked**2))
    half *= _DEVIATIONS / (1 + square / asked)
    return max(0.0, middle - half), min(1.0, middle + half)


def of_mean(values: Sequence[float]) -> tuple[float, float]:
    """Where the mean of what the values were drawn from is: the percentiles of means of as many values that
    are drawn from these with replacement (Efron 1979). The draws are the same each time."""
    given = np.asarray(values)
    drawn = np.random.default_rng(0).integers(len(given), size=(_DRAWS, len(given)))
    low, high = np.quantile(given[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)
