"""The two factors of a low-rank correction, without statistics and with the moment of a weight's inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def factors(
    residual_NM: Tensor, rank: int, moment_MM: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """left [N, rank] and right [rank, M], float32, with the least |(residual - left right) S|_F.

    `moment` = S Sᵀ is the mean of x xᵀ over inputs x of the weight, so that the norm is the error of its
    outputs; without it S is the identity. With V the leading eigenvectors of (E S)ᵀ (E S), E the residual,
    that is left = E S V, right = Vᵀ S⁻¹ (Eckart and Young 1936). S is taken from the moment's eigenvectors;
    directions that no input has count 1e-8 of the average one, where S would not be invertible. Both factors
    of each direction get the same length. Beyond the rank of the residual they are zeros.

    Source: EoRA (Liu et al. 2024, section 3), which takes eigenvectors of the moment as here; LQER (Zhang et
    al. 2024, section 3.2) takes the mean magnitudes of channels, which is this for a diagonal moment of
    their squares.
    """
    residual = residual_NM.double()
    width = residual.shape[1]
    if moment_MM is None:
        root = back = torch.ones(1, dtype=torch.float64, device=residual.device)
        axes = None
    else:
        sizes, axes = torch.linalg.eigh(moment_MM.double())
        floor = sizes.mean() * 1e-8
        root = sizes.clamp(min=float(floor) or 1.0).sqrt()
        back = 1 / root
    seen = (residual if axes is None else residual @ axes) * root
    directions = torch.linalg.eigh(seen.T @ seen)[1].flip(-1)[:, :rank]
    left, right = seen @ directions, directions.T * back
    if axes is not None:
        right = right @ axes.T
    lengths = left.norm(dim=0), right.norm(dim=1)
    share = torch.where(lengths[0] > 0, (lengths[1] / lengths[0]).sqrt(), 0.0)
    left, right = left * share, right * torch.where(share > 0, 1 / share, 0.0)[:, None]
    missing = rank - min(rank, width)
    left = torch.nn.functional.pad(left, (0, missing))
    return left.float(), torch.nn.functional.pad(right, (0, 0, 0, missing)).float()
