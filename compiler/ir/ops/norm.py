"""Normalisations, alone and with the residual addition that precedes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .record import OPERATORS, Operator


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis (Zhang and Sennrich 2019, eq. 4)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@OPERATORS.register
@dataclass(eq=False)
class RmsNorm(Operator):
    """`rms_norm_reference`."""

    name = "rms_norm"
    overwrites = (("x",),)
    by_rows = ("x",)

    x: Tensor
    weight: Tensor
    eps: float

    def run(self) -> Tensor:
        return rms_norm_reference(self.x, self.weight, self.eps)


@OPERATORS.register
@dataclass(eq=False)
class AddRmsNorm(Operator):
    """total = x + residual; gives (rms_norm(total), total)."""

    name = "add_rms_norm"
    overwrites = (("x", "residual"), ("residual", "x"))

    x: Tensor
    residual: Tensor
    weight: Tensor
    eps: float

    def run(self) -> tuple[Tensor, Tensor]:
        total = self.x + self.residual
        return rms_norm_reference(total, self.weight, self.eps), total

    def shapes(self) -> tuple[Tensor, Tensor]:
        return torch.empty_like(self.x), torch.empty_like(self.x)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, over the last axis (Ba et al. 2016, section 3).

    Torch's own form cannot be given where to write, so this is made of calls that can. The variance is that
    of centred numbers, in float32 where x is a half, and differs from torch's by rounding.
    """
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    centred = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return (centred * inverse * weight.to(wide) + bias.to(wide)).to(x.dtype)


@OPERATORS.register
@dataclass(eq=False)
class LayerNorm(Operator):
    """`layer_norm_reference`."""

    name = "layer_norm"
    overwrites = (("x",),)
    by_rows = ("x",)

    x: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    def run(self) -> Tensor:
        return layer_norm_reference(self.x, self.weight, self.bias, self.eps)


@OPERATORS.register
@dataclass(eq=False)
class AddLayerNorm(Operator):
    """total = x + residual; gives (layer_norm(total), total)."""

    name = "add_layer_norm"
    overwrites = (("x", "residual"), ("residual", "x"))

    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    def run(self) -> tuple[Tensor, Tensor]:
        total = self.x + self.residual
        return layer_norm_reference(total, self.weight, self.bias, self.eps), total

    def shapes(self) -> tuple[Tensor, Tensor]:
        return torch.empty_like(self.x), torch.empty_like(self.x)
