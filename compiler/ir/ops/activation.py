"""The gated activation of a transformer MLP (Shazeer 2020, "GLU Variants Improve Transformer")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .record import OPERATORS, Operator

#: Kinds of gate. "swiglu_clamped" is GPT-OSS's: both halves clamped, gate * sigmoid(alpha * gate) * (up + 1).
GATES = ("silu", "gelu", "gelu_tanh", "relu", "swiglu_clamped")


def gated_activation_reference(
    gate: Tensor, up: Tensor, kind: str, alpha: float = 1.0, limit: float = 0.0
) -> Tensor:
    """activation(gate) * up for a kind of `GATES`; `alpha`, `limit` serve "swiglu_clamped" alone."""
    if kind == "silu":
        return functional.silu(gate) * up
    if kind == "gelu":
        return functional.gelu(gate) * up
    if kind == "gelu_tanh":
        return functional.gelu(gate, approximate="tanh") * up
    if kind == "relu":
        return functional.relu(gate) * up
    if kind == "swiglu_clamped":
        gate = gate.clamp(max=limit)
        up = up.clamp(min=-limit, max=limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    raise ValueError(f"unknown gate {kind!r}: one of {', '.join(GATES)}")


@OPERATORS.register
@dataclass(eq=False)
class GatedActivation(Operator):
    """`gated_activation_reference` of a kind without constants."""

    name = "gated_activation"
    overwrites = (("gate", "up"),)
    by_rows = ("gate", "up")

    gate: Tensor
    up: Tensor
    kind: str

    def run(self) -> Tensor:
        return gated_activation_reference(self.gate, self.up, self.kind)

    def shapes(self) -> Tensor:
        return torch.empty_like(self.gate, memory_format=torch.contiguous_format)
