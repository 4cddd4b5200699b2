"""Runs an artifact's graph in torch on one device, attention by kernels; the cache stays on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.ir.interpreter import Interpreter
from ..compiler.ir.program import Program
from ..compiler.ir.types import DTYPES
from .cache import Cache
from .runner import Floats, Ints


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
    ) -> None:
        self.device = device
        self.interpreter = Interpreter(program, instead=instead, device=device)
        self._weight_bytes = weight_bytes

    @property
    def weight_bytes(self) -> int:
        return self._weight_bytes

    def make(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A zeroed buffer of a cache, on the device."""
        return torch.zeros(shape, dtype=DTYPES[dtype], device=self.device)

    def step(self, cache: Cache, input_ids: Ints, position_ids: Ints, logit_rows: Ints) -> Floats:
        inputs: dict[str, Any] = {
            name: torch.tensor(array, device=self.device)
            for name, array in {
                "input_ids": input_ids,
                "position_ids": position_ids,
                "lengths": cache.lengths,
                "logit_rows": logit_rows,
            }.items()
        }
        outputs = self.interpreter.run(inputs | cache.buffers)
        logits: Floats = outputs["logits"].cpu().numpy()
        return logits
