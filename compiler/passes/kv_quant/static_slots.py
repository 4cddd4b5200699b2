"""What the passes share that give slots of codes, with scales a channel that are fixed at compile time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....errors import IRError, RecipeError
from ...calibrate.observer import Observer
from ...calibrate.sites import layer as site_of
from ...calibrate.stream import Later
from ...ir.item_bytes import ITEM_BYTES
from ...ir.kv.layout import PARTS, CacheLayout, HeadGroup, LayerCache, cache_name
from ...ir.kv.store.plain.storage import Plain
from ...ir.program import Program
from ...ir.weights import Weight
from ..base import Pass, PassResult

#: What the observer calls that which a weight is made of, and how it is.
Made = tuple[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class StaticSlots(Pass):
    """Gives its storage to every group in plain slots, and the scales of its channels to the program."""

    requires = frozenset({"cache planned"})

    @property
    @abstractmethod
    def storage(self) -> Plain:
        """What every plain storage becomes."""

    @abstractmethod
    def observer(self) -> Observer:
        """Finds what the weights of a cache are made of, in the calibration text."""

    @abstractmethod
    def weights(self, program: Program) -> dict[str, Made]:
        """The weights [heads, size] that a group gets, by the last part of their names, which begins with
        "key" or "value"."""

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        if program.layout is None:
            result.skipped("graph", "no attention in the graph")
            return result
        found = Later(program, [self.observer()])
        wanted = self.weights(program)
        layers = []
        for layer in program.layout.layers:
            owner = layer.groups[0].owner
            if owner is not None:
                layers.append(layer)
                result.skipped(f"layer {layer.layer}", f"reads the cache of layer {owner}")
                continue
            groups = tuple(self._stored(layer, group) for group in layer.groups)
            layers.append(replace(layer, groups=groups))
            if groups == layer.groups:
                result.skipped(
                    f"layer {layer.layer}", f"is stored by {groups[0].storage.name} already"
                )
                continue
            for index, group in enumerate(groups):
                if group.storage == self.storage:
                    for name, (of, made) in wanted.items():
                        program.cache_weights[f"{cache_name(layer.layer, index)}.{name}"] = Weight(
                            (len(group.heads), layer.size(name.partition("_")[0])),
                            torch.float32,
                            _from(found, layer.layer, name, of, group.heads, made),
                        )
            result.applied(f"layer {layer.layer}", self._said(layer))
        program.layout = CacheLayout(tuple(layers))
        program.calibrations.append(found)
        return result

    def _stored(self, layer: LayerCache, group: HeadGroup) -> HeadGroup:
        if not group.storage.plain:
            return group
        try:
            for part in PARTS:
                self.storage.slot_width(layer.size(part))
            return replace(group, storage=self.storage)
        except IRError as error:
            raise RecipeError(f"cache.storage, layer {layer.layer}: {error}") from error

    def _said(self, layer: LayerCache) -> str:
        per_token = layer.kv_heads * sum(map(layer.size, PARTS))
        width = sum(self.storage.slot_width(layer.size(part)) for part in PARTS)
        each = ITEM_BYTES[self.storage.slot_dtype]
        return f"{layer.kv_heads * width * each} bytes a token, from {4 * per_token}"


def _from(
    found: Later,
    layer: int,
    name: str,
    of: str,
    heads: Sequence[int],
    made: Callable[[Tensor], Tensor],
) -> Callable[[], Tensor]:
    """Gives a weight [heads, size] of one cache once the text was read."""

    def load() -> Tensor:
        seen_KD = found.at(f"{site_of(layer)}.{name.partition('_')[0]}")[of]
        return made(seen_KD[list(heads)])

    return load
