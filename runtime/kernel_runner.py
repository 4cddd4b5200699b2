"""Runs an artifact's graph in torch on one device, attention by kernels; the cache stays on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.ir.interpreter import Interpreter
from ..compiler.ir.kv.layout import Buffer
from ..compiler.ir.ops import IN_PLACE
from ..compiler.ir.program import Program
from ..compiler.ir.types import DTYPES
from .cache import Cache
from .runner import Floats, Ints, running


class KernelRunner:
    """`instead` has the function for each attention; it writes the cache's buffers in place.

    All other operators run by their reference meaning. Weights go to the device when they are first
    read, and stay.
    """

    def __init__(
        self,
        program: Program,
        instead: Mapping[fx.Node, Callable[..., Any]],
        device: torch.device,
        weight_bytes: int,
        name: str = "in memory",
    ) -> None:
        self._name = name
        self.device = device
        self.interpreter = Interpreter(program, instead={**IN_PLACE, **instead}, device=device)
        self.observed: Mapping[str, Any] = {}
        self._weight_bytes = weight_bytes

    @property
    def weight_bytes(self) -> int:
        return self._weight_bytes

    def make(self, spec: Buffer) -> Tensor:
        """The zeroed tensor that a buffer of the cache asks for, on the device."""
        return torch.zeros(spec.shape, dtype=DTYPES[spec.dtype], device=self.device)

    def step(self, cache: Cache, input_ids: Ints, position_ids: Ints, logit_rows: Ints) -> Floats:
        arrays = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "logit_rows": logit_rows,
            **cache.counters,
        }
        inputs = {name: torch.tensor(array, device=self.device) for name, array in arrays.items()}
        with running(self._name):
            outputs = self.interpreter.run(inputs | cache.buffers)
            logits: Floats = outputs.pop("logits").cpu().numpy()
        self.observed = {name: v for name, v in outputs.items() if name not in cache.buffers}
        return logits
