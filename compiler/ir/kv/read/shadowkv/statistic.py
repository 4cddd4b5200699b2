"""The mean of a page's keys and how far they are apart, in torch.

Shape suffixes as in `read/pages`; E is one more than the head size: the mean, then the number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .numbers import FARTHEST, TINY


class Landmarks:
    """Options change nothing of it."""

    def of_pages(self, keys_BKPND: Tensor) -> Tensor:
        """The statistic of whole pages of keys [B, K, P, E], rounded where keys are codes."""
        wide = keys_BKPND if keys_BKPND.dtype == torch.float64 else keys_BKPND.float()
        mean_BKPD = wide.mean(3)
        length_BKP = wide.square().sum((3, 4)) / wide.shape[3]
        alike_BKP = mean_BKPD.square().sum(3) / length_BKP.clamp(min=TINY)
        found = torch.cat((mean_BKPD, (FARTHEST * (1 - alike_BKP))[..., None]), -1)
        if not keys_BKPND.is_floating_point():
            found = (found + 0.5).floor()  # as every target can
        return found.to(keys_BKPND.dtype)

    def asked(self, q_BKGSD: Tensor) -> Tensor:
        """Of each query what the mean is multiplied with; the last number is no part of a score."""
        return torch.nn.functional.pad(q_BKGSD, (0, 1))
