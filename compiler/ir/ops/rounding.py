"""Activations in 8 bits: what a product of integers makes of its other operand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .record import OPERATORS, Operator

#: The largest code, and the smallest scale: a row of zeros has one too.
LARGEST, LEAST = 127, 2.0**-100


@OPERATORS.register
@dataclass(eq=False)
class RoundToInt8(Operator):
    """x [.., M] as its rows are in 8 bits: integers of -127 to 127 times a scale of the row's own.

        s = max |x| / 127,    x -> round(x / s) s

    Scales are float32 and found as the numbers come, so no calibration decides them. A linear behind it whose
    weights are integers too is a product of integers, times the scales of both: a target that multiplies so
    computes this function.

    Source: vector-wise quantization of LLM.int8() (Dettmers et al. 2022, section 3.1, without its outliers
    in 16 bits), and the dynamic scales per token of SmoothQuant (Xiao et al. 2023, section 2). Ties go to
    even.
    """

    name = "round_to_int8"
    overwrites = (("x",),)

    x: Tensor

    def run(self) -> Tensor:
        wide = self.x.float()
        scales = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=LEAST)
        return ((wide / scales).round() * scales).to(self.x.dtype)

    def shapes(self) -> Tensor:
        if not self.x.is_floating_point() or not self.x.ndim:
            raise ValueError("what is rounded has rows of floats")
        return torch.empty_like(self.x, memory_format=torch.contiguous_format)
