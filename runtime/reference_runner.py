"""Runs an artifact's graph by the reference meaning of its operators, in torch. Slow, and always there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import safe_open

from ..compiler.ir.interpreter import Interpreter
from ..compiler.ir.manifest import GRAPH, WEIGHTS
from ..compiler.ir.ops import IN_PLACE
from ..compiler.ir.parser import parse
from ..compiler.ir.program import Program
from ..compiler.ir.weights import Weight
from ..errors import ArtifactError
from .artifact import Artifact
from .cache import Array, Cache
from .runner import Floats, Ints


def read_program(artifact: Artifact, device: str = "cpu") -> Program:
    """The artifact's graph; its weights are read onto the device when they are asked for."""
    weights = safe_open(str(artifact.file(WEIGHTS)), framework="pt")
    present = set(weights.keys())

    def load(name: str, declared: Weight) -> Weight:
        if name not in present:
            raise ArtifactError(
                f"{artifact.folder}/{WEIGHTS} lacks the weight {name} that the graph reads"
            )
        return Weight(declared.shape, declared.dtype, lambda: weights.get_tensor(name).to(device))

    return parse(artifact.file(GRAPH).read_text("utf-8"), load)


class ReferenceRunner:
    """The same graph and the same weights as the target's, without the target."""

    def __init__(self, artifact: Artifact, keep_weights: bool = True) -> None:
        """Without `keep_weights` each weight is read when it is needed, and only one is held."""
        self.program = read_program(artifact)
        self.interpreter = Interpreter(self.program, keep_weights, IN_PLACE)
        self.observed: Mapping[str, Array] = {}
        self._weight_bytes = artifact.weight_bytes()

    @property
    def weight_bytes(self) -> int:
        return self._weight_bytes

    def step(self, cache: Cache, input_ids: Ints, position_ids: Ints, logit_rows: Ints) -> Floats:
        small = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "logit_rows": logit_rows,
            **cache.counters,
        }
        inputs = {name: torch.tensor(array) for name, array in small.items()}
        inputs |= {name: torch.from_numpy(buffer) for name, buffer in cache.buffers.items()}
        outputs = {name: value.numpy() for name, value in self.interpreter.run(inputs).items()}
        logits: Floats = outputs.pop("logits")
        self.observed = {name: v for name, v in outputs.items() if name not in cache.buffers}
        return logits
