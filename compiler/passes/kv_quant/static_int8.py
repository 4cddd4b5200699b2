"""static_int8: keys and values in int8, with one scale a channel that is fixed at compile time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...calibrate.observers.kv_ranges import KVRanges
from ...calibrate.sites import layer as site_of
from ...calibrate.stream import Later
from ...ir.kv.layout import PARTS, CacheLayout, cache_name
from ...ir.kv.store.plain.storage import Plain
from ...ir.program import Program
from ...ir.weights import Weight
from ..base import Pass, PassResult

#: Smallest scale: a channel that is zero throughout is stored as zeros.
_SMALLEST = 1e-8


@dataclass(frozen=True)
class StaticInt8(Pass):
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
    requires = frozenset({"cache planned"})

    @property
    def storage(self) -> Plain:
        """What every plain storage becomes."""
        return Plain("i8", "channel")

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        if program.layout is None:
            result.skipped("graph", "no attention in the graph")
            return result
        ranges = Later(program, [KVRanges()])
        layers = []
        for layer in program.layout.layers:
            owner = layer.groups[0].owner
            if owner is not None:
                layers.append(layer)
                result.skipped(f"layer {layer.layer}", f"reads the cache of layer {owner}")
                continue
            groups = []
            for index, group in enumerate(layer.groups):
                if not group.storage.plain:
                    groups.append(group)
                    continue
                groups.append(replace(group, storage=self.storage))
                for part in PARTS:
                    program.cache_weights[f"{cache_name(layer.layer, index)}.{part}_scale"] = (
                        Weight(
                            (len(group.heads), layer.size(part)),
                            torch.float32,
                            _scales(ranges, layer.layer, part, group.heads),
                        )
                    )
            layers.append(replace(layer, groups=tuple(groups)))
            if tuple(groups) == layer.groups:
                result.skipped(
                    f"layer {layer.layer}", f"is stored by {groups[0].storage.name} already"
                )
                continue
            per_token = layer.kv_heads * (layer.key_size + layer.value_size)
            result.applied(
                f"layer {layer.layer}", f"{per_token} bytes a token, from {4 * per_token}"
            )
        program.layout = CacheLayout(tuple(layers))
        program.calibrations.append(ranges)
        return result


def _scales(ranges: Later, layer: int, part: str, heads: Sequence[int]) -> Callable[[], Tensor]:
    """Gives the int8 scales [heads, size] of one cache once the text was read."""

    def load() -> Tensor:
        range_KD = ranges.at(f"{site_of(layer)}.{part}")["range"]
        return (range_KD[list(heads)] / 127).clamp(min=_SMALLEST)

    return load
