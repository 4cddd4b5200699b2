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
    mean = float(moment_MM.diagonal().mean()) or 1.0
    found = moment_MM.clone()
    found.diagonal()[moment_MM.diagonal() == 0] = mean  # of channels that are always 0
    found.diagonal().add_(share * mean)
    return found


def factorised(moment_MM: Tensor, damping: float) -> Tensor:
    """The Cholesky factor of moments in float64, damped as far as is needed. `moment_MM` is of any type, and
    stays as it is; two matrices in float64 are held at a time.

    Raises CalibrationError where no damping helps.
    """
    for attempt in range(_TRIES):
        found = torch.linalg.cholesky_ex(damped(moment_MM.double(), damping * 10**attempt))
        if not int(found.info):
            factor: Tensor = found.L
            return factor
        del found
    raise CalibrationError(
        "the second moments of a linear's inputs cannot be factorised; a longer calibration text, or more "
        "damping (solver damping=0.1), gives some that can"
    )
