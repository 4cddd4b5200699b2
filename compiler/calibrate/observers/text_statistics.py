"""What a text shows of each layer: where attention goes, and what keys and values look like."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..stream import Found

#: Tokens whose keys and values are kept to compare layers by.
SAMPLED = 256


@dataclass
class AttentionMass:
    """Where attention goes, by distance and by token.

    `mass` [H, buckets]: the share of attention by distance; bucket 0 is a token itself, bucket n the
    distances 2^(n-1) to 2^n - 1. `saliency` [B, K, T]: the attention that a token gets from a query that
    sees it, on average over queries and the heads of a group (ZipCache, He et al. 2024, section 4.2).
    """

    kv_heads: int = 1
    _mass: Tensor = field(default_factory=lambda: torch.empty(0))
    _received: Tensor = field(default_factory=lambda: torch.empty(0))

    def begin(self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> None:
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


@dataclass
class KeyValues:
    """What keys and values look like.

    `key_max` and `value_max` [K, D]: largest magnitude of each channel; `key_mean` and `value_mean`: the
    mean magnitude, so that max / mean shows outliers; `key_sample` and `value_sample` [n, K * D]: the keys
    and values of some tokens.
    """

    _found: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> None:
        self._found = {}
        for part, x_BSKD in (("key", k_BSKD), ("value", v_BSKD)):
            magnitude = x_BSKD.abs()
            tokens = x_BSKD.flatten(0, 1).flatten(1)
            every = torch.linspace(0, len(tokens) - 1, min(SAMPLED, len(tokens))).long()
            self._found |= {
                f"{part}_max": magnitude.amax((0, 1)),
                f"{part}_mean": magnitude.mean((0, 1)),
                f"{part}_sample": tokens[every].clone(),
            }

    def block(self, start: int, weights_BHST: Tensor) -> None:
        """Keys and values say it all."""

    def end(self) -> Found:
        return self._found


def similarity(samples: list[Tensor]) -> Tensor:
    """Mean cosine [L, L] of the vectors that layers hold of the same tokens; 0 between unlike sizes."""
    count = len(samples)
    found = torch.eye(count)
    for a in range(count):
        for b in range(a):
            if samples[a].shape == samples[b].shape:
                cosine = torch.cosine_similarity(samples[a], samples[b], dim=-1).mean()
                found[a, b] = found[b, a] = cosine
    return found
