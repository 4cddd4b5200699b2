"""A Triton artifact whose weights need not all lie on the device: what each part of it takes of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from ....errors import UnsupportedError
from ....runtime.artifact import Artifact
from ....runtime.program import read_program
from ...analysis.liveness import peak_activation_bytes
from ...memory.survey import inputs_at
from ...memory.tiers import Fixed, Load, Piece, TierPlan
from .cut import CutProgram
from .device import find_device, free_memory, planned_device
from .offload import OffloadedRunner, copies_of
from .runner import arena_bytes, kernels_for

#: Bytes of the device that CUDA's context, libraries and kernels take. Assumed: never measured.
PROCESS = 600_000_000

#: Tokens whose cache must have room beside weights that all stay, where nobody says how many.
_TOKENS = 4096


@dataclass(frozen=True)
class TritonInParts:
    """A program in super-ops, read and checked; no weight is loaded. `runner` may be asked for once."""

    artifact: Artifact
    cut: CutProgram

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        return cls(artifact, CutProgram.of(read_program(artifact)))

    def load(self, chunk: int, cache: int, capacity: int = 0) -> Load:
        """What the device holds: of values within a step of `chunk` tokens, with logits of one, and of a
        cache for `capacity` tokens. What rows are looked up in is not there."""
        pieces = [Piece("tables", 0, 0)] if self.cut.lookups else []
        for op in self.cut.ops:
            nbytes = self.cut.block(op.weights).nbytes
            stored = sum(self.cut.stored[name] for name in op.weights)
            pieces.append(Piece(op.name, nbytes, nbytes, original=stored))
        activations = self._activations(chunk, capacity or self.cut.program.model.context)
        fixed = Fixed(PROCESS, cache, activations, self.cut.block(self.cut.shared).nbytes)
        return Load(tuple(pieces), fixed, home="host", unspilled="that of a GPU stays there")

    def spilling(self, load: Load, capacity: int) -> Load:
        return load

    def runner(
        self, plan: TierPlan, threads: int | None = None, trust: bool = False
    ) -> OffloadedRunner:
        """What runs it on the CUDA device. Raises UnsupportedError without one, OutOfMemoryError where it has
        less room than the plan takes."""
        device = find_device()
        copies = copies_of(device)
        instead = kernels_for(self.artifact, self.cut.program, device, trust)
        return OffloadedRunner(self.artifact, self.cut, plan, instead, copies, device)

    def _activations(self, chunk: int, capacity: int) -> int:
        """Bytes of the arena of a step, and of rows that it is given. Without Triton no kernel says what it
        takes beside its results, and that is left out."""
        program = self.cut.program
        slots = {} if program.layout is None else program.layout.slot_dims(capacity, capacity)
        dims = {"B": 1, "S": chunk, "N": 1} | slots
        given = inputs_at(program, dims)
        rows = sum(given[lookup.name].nbytes for lookup in self.cut.lookups)
        try:
            arena = arena_bytes(program, given, planned_device())
        except UnsupportedError:
            arena = peak_activation_bytes(program, dims)
        return rows + arena


def limit(artifact: Artifact) -> int | None:
    """A budget of the memory that the CUDA device has free, and of what this process has of it already, where
    weights and a cache of 4,096 tokens may find too little: as much as a process takes is left for what a
    step computes. None where they find enough, or nothing runs on such a device."""
    free = free_memory()
    if free is None:
        return None
    tokens = min(_TOKENS, artifact.manifest.model.context)
    cache = int(artifact.manifest.layout().peak_bytes(1, tokens, tokens))
    return free + PROCESS if artifact.weight_bytes() + cache + PROCESS > free else None
