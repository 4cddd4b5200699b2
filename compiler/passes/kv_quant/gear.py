"""GEAR: quantized codes, a low-rank part of their error, and sparse outliers."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.kv.store.gear.storage import Gear as Storage
from .layers import PackingPass


@dataclass(frozen=True)
class Gear(PackingPass):
    """Packs older tokens into `bits` bits a number and stores what that loses (Kang et al. 2024, section 3).

    Before: `cache 0.0 heads=0,1 .. policy=full storage=f32`
    After:  `cache 0.0 heads=0,1 .. policy=full storage=gear(..,tokens=128,rank=2,share=0.02)`

    Options: as for KIVI, whose codes are the backbone; `tokens`, a granule, which is decomposed as one;
    `rank` of each head's error in a granule (the paper: 4 for prompts, 2 for what is generated); `share`
    of each vector's numbers that are set aside as outliers, half of them the largest and half the
    smallest (the paper: 0.02), to the nearest whole count: 0.02 is one at each end of 128 numbers, and none
    of a token's value in a head of 32.

    Their number is fixed at compile time: what is no outlier by count is quantized, and nothing overflows.

    Differs from the paper: the low-rank part is of each granule and not of the whole prompt, so that both
    ways of prefilling give the same form; an outlier's vector is a channel of a granule's keys or a token's
    value in one head.
    """

    bits: int = 2
    group: int = 32
    tokens: int = 128
    rank: int = 2
    share: float = 0.02
    residual: int = 128
    slack: int = 64
    keys: str = "channel"
    prefill: str = "exact"

    name = "gear"

    def storage(self) -> Storage:
        return Storage(
            self.residual,
            self.slack,
            self.prefill,
            self.bits,
            self.bits,
            self.group,
            self.keys,
            self.tokens,
            self.rank,
            self.share,
        )
