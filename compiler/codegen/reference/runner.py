"""Runs an artifact's graph by the reference meaning of its operators, in torch. Slow, and always there."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ....runtime.artifact import Artifact
from ....runtime.buffers import Array
from ....runtime.cache import Cache
from ....runtime.program import read_program
from ....runtime.runner import Floats, Ints, running
from ...ir.interpreter import Interpreter
from ...ir.manifest import WHOLE, Part
from ...ir.ops.record import in_place
from ...memory.arena import InArena


class ReferenceRunner:
    """The same graph and the same weights as the target's, without the target."""

    def __init__(self, artifact: Artifact, keep_weights: bool = True) -> None:
        """Intermediate values lie in an arena. Without `keep_weights` each weight is read when it is needed
        and only one is held, and intermediate values are allocated one by one."""
        self.program = read_program(artifact)
        self.interpreter = (
            InArena(self.program) if keep_weights else Interpreter(self.program, False, in_place())
        )
        self.observed: Mapping[str, Array] = {}
        self._weight_bytes = artifact.weight_bytes()
        self._name = str(artifact.folder)

    @property
    def weight_bytes(self) -> int:
        return self._weight_bytes

    def step(self, cache: Cache, input_ids: Ints, position_ids: Ints, logit_rows: Ints) -> Floats:
        small = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "logit_rows": logit_rows,
            **cache.counters,
            **cache.given,
        }
        inputs = {
            name: torch.from_numpy(np.require(a, None, ("C", "W"))) for name, a in small.items()
        }
        inputs |= {name: torch.from_numpy(buffer) for name, buffer in cache.buffers.items()}
        with running(self._name):
            outputs = {name: value.numpy() for name, value in self.interpreter.run(inputs).items()}
        logits: Floats = outputs.pop("logits").copy()  # out of the arena: a caller may keep them
        self.observed = {name: v for name, v in outputs.items() if name not in cache.buffers}
        return logits


class ReferenceCaller:
    """An encoder's graph and weights, without the target."""

    def __init__(self, artifact: Artifact, keep_weights: bool = True, part: Part = WHOLE) -> None:
        """As `ReferenceRunner`."""
        program = read_program(artifact, part=part)
        self.interpreter = InArena(program) if keep_weights else Interpreter(program, False)
        self._weight_bytes = artifact.weight_bytes()
        self._name = str(artifact.folder)

    @property
    def weight_bytes(self) -> int:
        return self._weight_bytes

    def call(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        given = {name: torch.tensor(array) for name, array in inputs.items()}
        with running(self._name):
            results = self.interpreter.run(given)
        return {name: value.numpy().copy() for name, value in results.items()}  # out of the arena
