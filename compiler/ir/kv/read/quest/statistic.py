"""The largest and the smallest numbers of a page's keys, in torch.

Shape suffixes as in `read/pages`; E is twice the head size: a page's largest numbers, then its smallest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bounds:
    """`spread` says how far from the middle between them to either a score counts."""

    spread: float

    def of_pages(self, keys_BKPND: Tensor) -> Tensor:
        """The bounds of whole pages of keys, [B, K, P, E]."""
        return torch.cat((keys_BKPND.amax(3), keys_BKPND.amin(3)), -1)

    def asked(self, q_BKGSD: Tensor) -> Tensor:
        """Of each query what the largest numbers are multiplied with, and the smallest."""
        half, away = q_BKGSD / 2, (q_BKGSD * (self.spread / 2)).abs()
        return torch.cat((half + away, half - away), -1)
