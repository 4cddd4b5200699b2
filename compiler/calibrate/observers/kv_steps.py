"""The steps that keys and values are rounded to in few bits, by layer, KV head and channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir.ops.rotary import rotary_reference
from ...ir.program import Program
from ...ir.quant.hadamard import hadamard
from .. import sites
from ..observer import OBSERVERS, Found, Observer
from ..sites import Site

#: Positions that each key is seen at, of those that its rotary embedding has.
_PLACES = 4

#: Steps that are tried, as shares of the one which cuts nothing.
_SHARES = torch.linspace(0.25, 1.0, 31)

#: Smallest step: a channel that is zero throughout is stored as zeros.
_SMALLEST = 1e-8


@OBSERVERS.register
@dataclass
class KVSteps(Observer):
    """Of codes of so many bits, from -2^(bits-1) to 2^(bits-1) - 1, each an equal step from the next:

    `step` [K, D]: the step of each channel with the least squared error; of keys `centre` [K, D] too, the
    mean of each channel, and `centred` [K, D], that step of what is left without it.

    Keys are rotated over the channels of their head by a Hadamard matrix, behind their rotary embedding at
    random positions of all that its tables have. Values are seen as they are.
    """

    bits: int = 4

    name = "kv_steps"

    @property
    def key(self) -> str:
        return f"{self.name}-{self.bits}"

    def sites(self, program: Program) -> list[Site]:
        return sites.keys_and_values(program, rotated=False)

    def see(self, site: Site, *values: Any) -> Found:
        x_BSKD, *rotary = values
        x_TKD = x_BSKD.flatten(0, 1)
        if not rotary:
            return {"step": steps(x_TKD, self.bits)}
        x_TKD = hadamard(anywhere(x_TKD, *rotary))
        centre_KD = x_TKD.mean(0)
        return {
            "step": steps(x_TKD, self.bits),
            "centre": centre_KD,
            "centred": steps(x_TKD - centre_KD, self.bits),
        }


def anywhere(
    k_TKD: Tensor, cos_PR: Tensor | None, sin_PR: Tensor | None, interleaved: bool
) -> Tensor:
    """Keys turned to positions drawn at random, each to several; as they are where nothing turns them."""
    if cos_PR is None or sin_PR is None:
        return k_TKD
    several = k_TKD.repeat(_PLACES, 1, 1)
    random = torch.Generator().manual_seed(0)
    place_T = torch.randint(len(cos_PR), (len(several),), generator=random)
    found: Tensor = rotary_reference(several[None], place_T[None], cos_PR, sin_PR, interleaved)[0]
    return found


def steps(x_TKD: Tensor, bits: int) -> Tensor:
    """The step of each channel with the least squared error of rounding to codes of so many bits, [K, D]."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    widest_KD = (x_TKD.abs().amax(0) / high).clamp(min=_SMALLEST)
    best_KD: Tensor = widest_KD
    least_KD = torch.full_like(widest_KD, torch.inf)
    for share in _SHARES:
        step_KD = (widest_KD * share).clamp(min=_SMALLEST)
        error_TKD = (x_TKD / step_KD).round().clamp(low, high) * step_KD - x_TKD
        error_KD = error_TKD.square().mean(0)
        best_KD = torch.where(error_KD < least_KD, step_KD, best_KD)
        least_KD = torch.minimum(error_KD, least_KD)
    return best_KD
