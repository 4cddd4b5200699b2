"""The `einfold::*` operators: one reference meaning each, in plain torch.

Every operator is a `torch.library.custom_op` with a fake (shape-only) implementation, so that
graphs that hold them can be traced, shape-checked, printed, and run by the reference interpreter.
A target (ONNX, Triton) is right when it agrees with what stands here.

Shape suffixes in this folder:
    B batch, S new tokens of this step, C cache capacity in tokens, T tokens in all (B*S flattened)
    H query heads, K key/value heads, D head size, R rotary width, P positions in a table
    M model width, I MLP width, V vocabulary, N outputs of a linear, E experts, J experts a token takes
    G quantization groups along the input axis
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import (
    activation,
    attention,
    experts,
    linear,
    low_rank,
    norm,
    packed,
    quantized,
    rotary,
    rows,
    shared,
)

__all__ = [
    "IN_PLACE",
    "activation",
    "attention",
    "einfold_ops",
    "experts",
    "linear",
    "low_rank",
    "norm",
    "packed",
    "quantized",
    "rotary",
    "rows",
    "shared",
]

#: The namespace `torch.ops.einfold`; importing this module is what registers the operators.
einfold_ops = torch.ops.einfold

#: What may stand for operators that give updated caches, where the caller lets them be written in place.
IN_PLACE: dict[Any, Callable[..., Any]] = {
    einfold_ops.cached_attention.default: attention.cached_attention_in_place,
    einfold_ops.packed_attention.default: packed.packed_attention_in_place,
    einfold_ops.low_rank_attention.default: low_rank.low_rank_attention_in_place,
}
