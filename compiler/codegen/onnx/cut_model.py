"""An ONNX artifact taken apart into super-ops (cut.py), and what each would hold of memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Self

from ....errors import ArtifactError, UnsupportedError
from ....runtime.artifact import Artifact
from ....runtime.memory.pages import UNIT, no_paging
from ....runtime.memory.spill_file import free_bytes, no_spilling
from ....runtime.runner import running
from ...ir.kept import cache_home
from ...ir.kv.spill import file_bytes, spillable, spilled_buffers, stage_bytes, tail_bytes
from ...ir.manifest import WHOLE
from ...memory.spill import Slots
from ...memory.tiers import Choice, Fixed, Load, Piece, Skew
from .attention_bytes import of_layout
from .cut import SuperOp, buffer_of, cut, divide, holds_logits, largest_group
from .packed_copy import Layout, laid_out, no_copy, sums_are_read, told_of_experts, units_of
from .process import PROCESS
from .runner import checked_model

if TYPE_CHECKING:
    from onnx import ModelProto


#: ONNX's numbers of types that NumPy has too: float32, integers of 8 to 64 bits, bool, float16, float64.
_WHOLE_BYTES = frozenset((1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13))

#: Formats that onnxruntime unpacks, while it loads them, by way of many times their bytes: 287 MB to 3.6 GB
#: were measured where a plan said 190 to 270 MB. Of trellis nothing was measured.
_BY_WAY_OF_MORE = frozenset(("bitmod", "fp6", "olive", "planes", "spqr", "trellis"))


@dataclass(frozen=True)
class CutModel:
    """A model in super-ops, read and checked; no weight is loaded."""

    artifact: Artifact
    proto: ModelProto
    ops: tuple[SuperOp, ...]

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        from onnx import ModelProto

        weights = artifact.manifest.recipe["weights"]
        for name in (weights["format"], weights.get("head")):
            if name in _BY_WAY_OF_MORE:
                raise UnsupportedError(
                    f"{artifact.folder} holds weights in {name}, which onnxruntime unpacks by way of many "
                    "times their bytes, so that no budget can be promised; compile into another format, "
                    "such as int4"
                )
        if weights.get("activations") == "int8":
            raise UnsupportedError(
                f"{artifact.folder} multiplies activations in 8 bits by integers, whose weights onnxruntime "
                "turns while it loads them: all must be resident; leave the memory budget out, or compile "
                "with weights.activations = f32"
            )
        proto = ModelProto.FromString(checked_model(artifact))
        with running(str(artifact.folder)):
            divide(proto)
            ops = cut(proto)
        for weight in (weight for op in ops for weight in op.weights):
            if weight.dtype not in _WHOLE_BYTES:
                raise UnsupportedError(
                    f"{artifact.file(WHOLE.model)} holds {weight.name} in a type of less than a byte, as "
                    "the portable flavour does: all of its weights must be resident; compile without "
                    "--portable"
                )
        return cls(artifact, proto, tuple(ops))

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The super-ops as onnxruntime holds them where it packs them itself."""
        return tuple(Piece(op.name, op.nbytes, op.held) for op in self.ops)

    def load(self, chunk: int, cache: int, capacity: int = 0) -> Load:
        """What it holds: of values within a step of `chunk` tokens, with logits of one, and of a cache for
        `capacity` tokens."""
        manifest = self.artifact.manifest
        activations = 4 * (
            chunk * max(op.widest for op in self.ops) + 2 * manifest.model.vocabulary
        )
        nodes = [node for op in self.ops for node in op.nodes]
        group, logits = largest_group(nodes), holds_logits(nodes)
        activations += of_layout(manifest.layout(), group, chunk, capacity, logits)
        fixed, reason = Fixed(PROCESS, cache, activations), self.why_not_paged()
        sums = sums_are_read()
        paged = () if reason else tuple(_paged(op, sums) for op in self.ops)
        skew = Skew.of(*told_of_experts(self.artifact, self.ops))
        return Load(self.pieces, fixed, paged, UNIT, reason, skew)

    def spilling(self, load: Load, capacity: int) -> Load:
        """The same with the layers whose slots of a cache for `capacity` tokens may be spilled: those that
        have their turn by themselves."""
        layout, found = self.artifact.manifest.layout(), list[Slots]()
        for layer, (first, last) in self.turns().items():
            buffers = list(spilled_buffers(layout[layer], 1, capacity))
            nbytes = sum(int(buffer.bytes()) for buffer in buffers)
            memory = (nbytes, tail_bytes(buffers), stage_bytes(buffers), nbytes // capacity)
            names = self.ops[first].name, self.ops[last].name
            found.append(Slots(layer, *names, *memory, file_bytes(buffers)))
        reason, disk = no_spilling(cache_home()), free_bytes(cache_home())
        return replace(load, slots=() if reason else tuple(found), unspilled=reason, disk=disk)

    def turns(self) -> dict[int, tuple[int, int]]:
        """Of each layer of the cache that may be spilled the first and the last super-op that read its slots.
        Layers whose slots others read so late that a turn lies across another are left out, the longest
        first. Raises ArtifactError where the manifest has a layer that no super-op reads."""
        found = dict[int, tuple[int, int]]()
        for entry in spillable(self.artifact.manifest.layout()):
            names = {buffer.name for buffer in spilled_buffers(entry, 1, 1)}
            readers = [i for i, op in enumerate(self.ops) if names & set(map(buffer_of, op.inputs))]
            if not readers:
                raise ArtifactError(
                    f"{self.artifact.folder} has a cache of layer {entry.layer} in its manifest that no part "
                    f"of {WHOLE.model} reads; compile it again"
                )
            found[entry.layer] = readers[0], readers[-1]
        for layer, (first, last) in sorted(found.items(), key=lambda it: it[1][0] - it[1][1]):
            others = [turn for other, turn in found.items() if other != layer]
            if any(first <= end and begin <= last for begin, end in others):
                del found[layer]
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def why_not_paged(self) -> str:
        """Why streamed weights cannot be pages of a packed copy; "" where they can."""
        widened = next((op for op in self.ops if op.weights and not op.packed), None)
        if widened is not None:
            return f"onnxruntime widens weights of {widened.name} while it loads them"
        return no_paging() or no_copy(self.artifact, self.ops)


def _paged(op: SuperOp, sums: bool) -> Piece:
    """A super-op as it lies in a packed copy, of which whole units are read; without `sums` a token leaves
    out those that hold nothing else."""
    layout = laid_out([[weight.nbytes for weight in group] for group in op.packed])
    nbytes = layout.nbytes if sums else _without_sums(op, layout)
    if op.routing is None or not op.nbytes:
        return Piece(op.name, nbytes, layout.nbytes, original=op.nbytes)
    chosen = op.chosen * layout.nbytes // op.nbytes
    choice = Choice(chosen, layout.most(op.routing.most))
    return Piece(op.name, nbytes, layout.nbytes, choice, op.nbytes)


def _without_sums(op: SuperOp, layout: Layout) -> int:
    """Bytes of the units in which there is more than sums."""
    units = set[int]()
    for at, weight in zip(chain(*layout.places), chain(*op.packed), strict=True):
        first, last = weight.sums
        units.update(units_of([(at, at + first), (at + last, at + weight.nbytes)]))
    return sum(UNIT for unit in units if unit * UNIT < layout.nbytes)
