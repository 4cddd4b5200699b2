"""Where attention goes, by distance and by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..observer import OBSERVERS, Found, Observer
from ..sites import Site


@OBSERVERS.register
@dataclass
class AttentionMass(Observer):
    """Where attention goes, by distance and by token.

    `mass` [H, buckets]: the share of attention by distance; bucket 0 is a token itself, bucket n the
    distances 2^(n-1) to 2^n - 1. `saliency` [B, K, T]: the attention that a token gets from a query that
    sees it, on average over queries and the heads of a group (ZipCache, He et al. 2024, section 4.2).
    """

    kv_heads: int = 1
    _mass: Tensor = field(default_factory=lambda: torch.empty(0))
    _received: Tensor = field(default_factory=lambda: torch.empty(0))

    name = "attention_mass"

    def begin(self, site: Site, *values: Any) -> None:
        q_BSHD, k_BSKD, _ = values
        batch, total, heads, _ = q_BSHD.shape
        self.kv_heads = k_BSKD.shape[2]
        self._mass = torch.zeros(heads, total.bit_length() + 1)
        self._received = torch.zeros(batch, heads, total)

    def block(self, start: int, weights_BHST: Tensor) -> None:
        rows, total = weights_BHST.shape[2:]
        distance = torch.arange(start, start + rows)[:, None] - torch.arange(total)
        bucket = torch.frexp(distance.clamp(min=0).float()).exponent.long()  # 0 -> 0, 2^n -> n + 1
        self._mass.index_add_(1, bucket.flatten(), weights_BHST.sum(0).flatten(1))
        self._received += weights_BHST.sum(2)

    def end(self) -> Found:
        batch, heads, total = self._received.shape
        seen_by = torch.arange(total, 0, -1)
        grouped = self._received.reshape(batch, self.kv_heads, heads // self.kv_heads, total)
        return {
            "mass": self._mass / (batch * total),
            "saliency": grouped.mean(2) / seen_by,
        }
