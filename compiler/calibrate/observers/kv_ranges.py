"""How large keys and values get, by layer, KV head and channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ir.program import Program
from .. import sites
from ..observer import OBSERVERS, Found, Observer
from ..sites import Site


@OBSERVERS.register
class KVRanges(Observer):
    """`range` [K, D]: the largest magnitude of each channel, of keys at any position."""

    name = "kv_ranges"

    def sites(self, program: Program) -> list[Site]:
        return sites.keys_and_values(program, rotated=False)

    def see(self, site: Site, *values: Any) -> Found:
        x_BSKD, *rotary = values
        return {"range": key_range(x_BSKD, *rotary) if rotary else value_range(x_BSKD)}


def value_range(v_BSKD: Tensor) -> Tensor:
    """Largest magnitude of each channel of each head, [K, D]."""
    return v_BSKD.abs().amax(dim=(0, 1))


def key_range(
    k_BSKD: Tensor, cos_PR: Tensor | None, sin_PR: Tensor | None, interleaved: bool
) -> Tensor:
    """Largest magnitude that each channel takes when these keys are turned to any position, [K, D].

    A rotation keeps the length of a pair of channels, so the pair's length bounds both at every position;
    tables that also stretch (YaRN) are counted in.
    """
    if cos_PR is None or sin_PR is None:
        return value_range(k_BSKD)
    width = 2 * cos_PR.shape[1]
    turned, rest = k_BSKD[..., :width], k_BSKD[..., width:]
    shape = (-1, 2) if interleaved else (2, -1)
    axis = -1 if interleaved else -2
    stretch = (cos_PR.square() + sin_PR.square()).amax(0).sqrt()
    pairs = turned.unflatten(-1, shape).norm(dim=axis).amax(dim=(0, 1)) * stretch
    both = pairs.repeat_interleave(2, -1) if interleaved else torch.cat((pairs, pairs), -1)
    return torch.cat((both, value_range(rest)), dim=-1)
