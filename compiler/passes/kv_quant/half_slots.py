"""half_slots: keys and values in float16, as peers keep them by default."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...ir.kv.layout import CacheLayout
from ...ir.kv.store.plain.storage import Plain
from ...ir.program import Program
from ..base import Pass, PassResult


@dataclass(frozen=True)
class HalfSlots(Pass):
    """Stores slots of float32 as float16, half of the bytes; what is larger than float16 has room for is cut.

    Before: `cache 0.0 heads=0,1 .. storage=f32`
    After:  `cache 0.0 heads=0,1 .. storage=f16`

    Numbers are rounded as they are written, to 11 bits; attention widens them and computes as before.
    """

    name = "half_slots"
    requires = frozenset({"cache planned"})

    @property
    def storage(self) -> Plain:
        """What float32 becomes."""
        return Plain("f16")

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        if program.layout is None:
            result.skipped("graph", "no attention in the graph")
            return result
        layers = []
        for layer in program.layout.layers:
            groups = tuple(
                replace(group, storage=self.storage) if group.storage == Plain() else group
                for group in layer.groups
            )
            layers.append(replace(layer, groups=groups))
            where, owner = f"layer {layer.layer}", layer.groups[0].owner
            if groups == layer.groups:
                result.skipped(where, f"is stored by {groups[0].storage.name} already")
            elif owner is not None:
                result.skipped(where, f"reads the cache of layer {owner}")
            else:
                per_token = layer.kv_heads * (layer.key_size + layer.value_size)
                result.applied(where, f"{2 * per_token} bytes a token, from {4 * per_token}")
        program.layout = CacheLayout(tuple(layers))
        return result
