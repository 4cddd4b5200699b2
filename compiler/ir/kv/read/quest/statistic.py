"""The largest and the smallest numbers of a page's keys, or one number between them, in torch.

Shape suffixes as in `read/pages`; E is twice the head size: a page's largest numbers, then its smallest. Of
numbers between them it is the head size.
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


@dataclass(frozen=True)
class Between:
    """`part` of the largest number and the rest of the smallest."""

    part: float

    def of_pages(self, keys_BKPND: Tensor) -> Tensor:
        """The numbers of whole pages of keys [B, K, P, D], rounded where keys are codes."""
        largest, smallest = keys_BKPND.amax(3), keys_BKPND.amin(3)
        if keys_BKPND.dtype != torch.float64:
            largest, smallest = largest.float(), smallest.float()
        found = self.part * largest + (1 - self.part) * smallest
        if not keys_BKPND.is_floating_point():
            found = (found + 0.5).floor()  # as every target can
        return found.to(keys_BKPND.dtype)

    def asked(self, q_BKGSD: Tensor) -> Tensor:
        """A query as it is."""
        return q_BKGSD
