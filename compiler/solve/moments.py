"""Second moments of inputs, such that they can be inverted."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import CalibrationError

#: Added to their diagonal where nothing else is said, as a share of its mean.
DAMPING = 0.01

#: How often damping is raised tenfold where moments cannot be factorised.
_TRIES = 4


def damped(moment_MM: Tensor, share: float) -> Tensor:
    """Moments with a share of their diagonal's mean added to it; what is 0 there is that mean first."""
    return _damp(moment_MM.clone(), share)


def _damp(moment_MM: Tensor, share: float) -> Tensor:
    diagonal = moment_MM.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean  # of channels that are always 0
    diagonal.add_(share * mean)
    return moment_MM


def factorised(moment_MM: Tensor, damping: float) -> Tensor:
    """The Cholesky factor of moments in float64, damped as far as is needed; no other matrix in float64 is
    held beside it. `moment_MM` is of any type, and stays as it is.

    Raises CalibrationError where no damping helps.
    """
    info = torch.empty((), dtype=torch.int32)
    for attempt in range(_TRIES):
        found = moment_MM.to(torch.float64, copy=True)
        by_column = _damp(found, damping * 10**attempt).mT  # as LAPACK has it: else it is copied
        torch.linalg.cholesky_ex(by_column, out=(by_column, info))
        if not int(info):
            return by_column
    raise CalibrationError(
        "the second moments of a linear's inputs cannot be factorised; a longer calibration text, or more "
        "damping (solver damping=0.1), gives some that can"
    )
