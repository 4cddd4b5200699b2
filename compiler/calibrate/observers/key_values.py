"""What keys and values look like: ranges, means, and samples to compare layers by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..observer import OBSERVERS, Found, Observer
from ..sites import Site

#: Tokens whose keys and values are kept to compare layers by.
SAMPLED = 256


@OBSERVERS.register
class KeyValues(Observer):
    """Of each layer, keys as they are cached.

    `key_max` and `value_max` [K, D]: largest magnitude of each channel; `key_mean` and `value_mean`: the
    mean magnitude, so that max / mean shows outliers; `key_sample` and `value_sample` [n, K * D]: the keys
    and values of some tokens.
    """

    name = "key_values"

    def see(self, site: Site, *values: Any) -> Found:
        _, k_BSKD, v_BSKD = values
        found: dict[str, Tensor] = {}
        for part, x_BSKD in (("key", k_BSKD), ("value", v_BSKD)):
            magnitude = x_BSKD.abs()
            tokens = x_BSKD.flatten(0, 1).flatten(1)
            every = torch.linspace(0, len(tokens) - 1, min(SAMPLED, len(tokens))).long()
            found |= {
                f"{part}_max": magnitude.amax((0, 1)),
                f"{part}_mean": magnitude.mean((0, 1)),
                f"{part}_sample": tokens[every].clone(),
            }
        return found


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
