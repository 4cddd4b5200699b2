"""Runs an artifact's graph by the reference meaning of its operators, in torch. Slow, and always there."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ....runtime.artifact import Artifact
from ....runtime.buffers import Array
from ....runtime.cache import Cache
from ....runtime.program import read_program
from ....runtime.runner import Floats, Ints, running
from ...ir.interpreter import Interpreter
from ...ir.manifest import WHOLE, Part
from ...ir.ops.record import in_place


class ReferenceRunner:
    """The same graph and the same weights as the target's, without the target."""

    def __init__(self, artifact: Artifact, keep_weights: bool = True) -> None:
        """Without `keep_weights` each weight is read when it is needed, and only one is held."""
        self.program = read_program(artifact)
        self.interpreter = Interpreter(self.program, keep_weights, in_place())
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
        inputs = {name: torch.tensor(array) for name, array in small.items()}
        inputs |= {name: torch.from_numpy(buffer) for name, buffer in cache.buffers.items()}
        with running(self._name):
            outputs = {name: value.numpy() for name, value in self.interpreter.run(inputs).items()}
        logits: Floats = outputs.pop("logits")
        self.observed = {name: v for name, v in outputs.items() if name not in cache.buffers}
        return logits


class ReferenceCaller:
    """An encoder's graph and weights, without the target."""

    def __init__(self, artifact: Artifact, keep_weights: bool = True, part: Part = WHOLE) -> None:
        """Without `keep_weights` each weight is read when it is needed, and only one is held."""
        self.interpreter = Interpreter(read_program(artifact, part=part), keep_weights)
        self._weight_bytes = artifact.weight_bytes()
        self._name = str(artifact.folder)

    @property
    def weight_bytes(self) -> int:
        return self._weight_bytes

    def call(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        given = {name: torch.tensor(array) for name, array in inputs.items()}
        with running(self._name):
            return {name: value.numpy() for name, value in self.interpreter.run(given).items()}
