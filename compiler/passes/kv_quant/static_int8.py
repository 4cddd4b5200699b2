"""static_int8: keys and values in int8, with one scale a channel that is fixed at compile time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...calibrate.observers.kv_ranges import KVRanges
from ...ir.kv.layout import PARTS
from ...ir.kv.store.plain.storage import Plain
from ...ir.program import Program
from .static_slots import Made, StaticSlots

#: Smallest scale: a channel that is zero throughout is stored as zeros.
_SMALLEST = 1e-8


@dataclass(frozen=True)
class StaticInt8(StaticSlots):
    """Stores the whole cache as int8, a quarter of the bytes of float32.

    Before: `cache 0.0 heads=0,1 .. storage=f32`
    After:  `cache 0.0 heads=0,1 .. storage=i8/channel`, and the weights `cache.0.0.key_scale` and
    `cache.0.0.value_scale` [heads, size].

    The scale of a channel is its largest magnitude on the calibration text over 127; what is larger
    later is cut there. The two channels that a rotary embedding turns into each other share the larger
    bound that holds at every position, so a short text decides for a long context too. Scales by channel
    and not by token follow KIVI (Liu et al. 2024, section 3), which found outlier channels in keys.
    """

    name = "static_int8"

    @property
    def storage(self) -> Plain:
        return Plain("i8", "channel")

    def observer(self) -> KVRanges:
        return KVRanges()

    def weights(self, program: Program) -> dict[str, Made]:
        return {f"{part}_scale": ("range", _scale) for part in PARTS}


def _scale(range_KD: Tensor) -> Tensor:
    return (range_KD / 127).clamp(min=_SMALLEST)
