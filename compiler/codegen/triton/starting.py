"""The one place that launches kernels. On tensors without numbers a launch is written down, not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....errors import IRError
from ...memory.recording import launched, runs_on


def start(
    function: Any, grid: tuple[int, ...], values: Sequence[Any], constants: Mapping[str, Any]
) -> None:
    """Launches a Triton function with its arguments, tensors and numbers, and its constants."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not any(tensor.is_meta for tensor in tensors):
        function[grid](*values, **constants)
        return
    left = tuple(None if isinstance(value, Tensor) else (value,) for value in values)
    strides = tuple(tensor.stride() for tensor in tensors)
    launched(Launch(function, grid, left, constants, strides), tensors)


def multiprocessors(tensor: Tensor) -> int:
    """Those that a launch over a tensor has; 0 where it runs on no GPU."""
    device = runs_on(tensor)
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@dataclass(frozen=True, eq=False)
class Launch:
    """A launch as a call of a graph: of tensors alone, for which there is None among its values.

    Numbers tell how far rows of the tensors are apart, so they must lie as they did when it was written down.
    """

    function: Any
    grid: tuple[int, ...]
    values: Sequence[tuple[Any] | None]
    constants: Mapping[str, Any]
    strides: tuple[tuple[int, ...], ...]

    __name__ = "launch"

    def __call__(self, *tensors: Tensor) -> None:
        if any(tensor.is_meta for tensor in tensors):
            if tuple(tensor.stride() for tensor in tensors) != self.strides:
                raise IRError("a kernel's tensors got other strides than it was written down with")
            return
        left = iter(tensors)
        values = [next(left) if value is None else value[0] for value in self.values]
        self.function[self.grid](*values, **self.constants)
