"""Attention of a layer that has no cache of its own and reads another layer's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .attention import OverPlainSlots
from .record import OPERATORS


@OPERATORS.register
@dataclass(eq=False)
class SharedAttention(OverPlainSlots):
    """Attention of S new tokens over the caches as another layer's `CachedAttention` left them.

    So `used` counts the slots of before this step, as it does there: query s sees slots up to used[b] + s,
    of which the newest were written in this step. Only the queries are rotated. `count`, the scales and the
    rest mean what they mean there; nothing is written. Gives [B, S, H, D].
    """

    name = "shared_attention"

    q_BSHD: Tensor
    key_cache_BKCD: Tensor
    value_cache_BKCD: Tensor
    used_B: Tensor
    count_BK: Tensor | None
    sinks_H: Tensor | None
    positions_BS: Tensor | None
    cos_PR: Tensor | None
    sin_PR: Tensor | None
    key_scale_KD: Tensor | None
    value_scale_KD: Tensor | None
    layer: int
    scale: float
    window: int
    softcap: float
    interleaved: bool
    read: str = ""

    def run(self) -> Tensor:
        return self.attended()
