"""The `einfold::*` operators: one reference meaning each, in plain torch.

Every operator is a record (`record.py`) with a shape-only form beside its meaning, so that graphs that hold
them can be traced, shape-checked, printed, and run by the reference interpreter. A target (ONNX, Triton) is
right when it agrees with what stands here.

Shape suffixes in this folder:
    B batch, S new tokens of this step, C cache capacity in tokens, T tokens in all (B*S flattened)
    H query heads, K key/value heads, D head size, R rotary width, P positions in a table
    M model width, I MLP width, V vocabulary, N outputs of a linear, E experts, J experts a token takes
    G quantization groups along the input axis
"""

from __future__ import annotations

import torch

from .record import OPERATORS

__all__ = ["OPERATORS", "einfold_ops"]

OPERATORS.read()

#: The namespace `torch.ops.einfold`; importing this module is what registers the operators.
einfold_ops = torch.ops.einfold
