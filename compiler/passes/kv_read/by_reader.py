"""One reader for all groups: the methods of `[cache.read]`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...ir.kv.layout import CacheLayout, HeadGroup, LayerCache
from ...ir.kv.read.reader import Reader
from ...ir.program import Program, own_windows
from ..base import GivenToHeads, PassResult

#: Tokens of a context in which no policy that lets go of tokens keeps all.
_MANY = 1 << 40


@dataclass(frozen=True)
class ReadByReader(GivenToHeads):
    """Lets every query of the groups whose tokens lie in plain slots read what a reader chooses.

    Before: `cache 0.0 heads=0,1 .. policy=full storage=f32`
    After:  `cache 0.0 heads=0,1 .. policy=full storage=f32 read=NAME(..)`
    """

    reader: Reader

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        if program.layout is None:
            result.skipped("graph", "no attention in the graph")
            return result
        windows = own_windows(program)
        layers = []
        for place, layer in enumerate(program.layout.layers):
            others = [other for other in program.layout.readers(layer.layer) if windows[other]]
            reason = self._left_alone(place, windows[layer.layer], others)
            layers.append(self._reading(layer, reason, result))
        program.layout = CacheLayout(tuple(layers))
        return result

    def _reading(self, layer: LayerCache, reason: str, result: PassResult) -> LayerCache:
        where, groups = f"layer {layer.layer}", []
        for group in layer.groups:
            heads = f"heads {','.join(map(str, group.heads))}"
            why = reason or self._cannot(group)
            if why:
                result.skipped(where, f"{heads} {why}")
                groups.append(group)
            else:
                result.applied(where, f"{heads} read {self.reader.says()}")
                groups.append(replace(group, reader=self.reader))
        return replace(layer, groups=tuple(groups))

    def _left_alone(self, place: int, window: int, others: list[int]) -> str:
        """Why a layer goes on reading all that it keeps; "" where it need not. `others` are layers that read
        its slots within a window."""
        if window:
            return f"have a sliding window of {window} tokens of their own"
        if others and self.reader.reorders:
            return (
                f"are read within a window by layer {others[0]} too, so that slots keep their order"
            )
        return self.reader.leaves(place)

    def _cannot(self, group: HeadGroup) -> str:
        """The same of a group."""
        if not group.storage.plain:
            return f"are stored as {group.storage.name}, which is read whole"
        if group.policy.compensated:
            return "have a slot that stands for many tokens, which every query reads"
        if self.reader.bounded and group.owner is not None:
            return f"read the cache of layer {group.owner}, and statistics of pages are kept with one's own"
        if self.reader.reorders and group.moves:
            return "let go of tokens, so that slots move, and pages of like keys are filled once, for good"
        kept = int(group.slots(_MANY))
        if group.moves and self.reader.reads(kept) >= kept:
            return f"keep {kept} tokens, and a query reads as many"
        return ""
