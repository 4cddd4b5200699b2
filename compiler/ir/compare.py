"""How far numbers are from what they should be: the one measure that every check of a compile uses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Difference:
    """The largest difference of two arrays, beside the largest number that was expected."""

    largest: float
    """inf where one side is finite or NaN and the other is not, or where the shapes differ."""
    scale: float
    """The largest finite magnitude that was expected, and 1 at least."""

    @property
    def share(self) -> float:
        """The largest difference as a share of the largest number."""
        return self.largest / self.scale


def difference(found: npt.ArrayLike, expected: npt.ArrayLike) -> Difference:
    """Compares two arrays of numbers or booleans, in float64.

    NaN agrees with NaN, and an infinity with the same infinity, in the same place.
    """
    a, b = np.asarray(found), np.asarray(expected)
    if not np.iscomplexobj(b):
        a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(b)
    scale = max(1.0, float(np.abs(b[finite]).max(initial=0.0)))
    if a.shape != b.shape or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return Difference(float("inf"), scale)
    if not np.isfinite(a[finite]).all():
        return Difference(float("inf"), scale)
    return Difference(float(np.abs(a[finite] - b[finite]).max(initial=0.0)), scale)
