"""Types of tensors as Triton names them, and those of a kernel's outputs."""

from __future__ import annotations

import torch

from .kernel import Kernel

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
DTYPES = {name: dtype for dtype, name in TYPES.items()}


def output_type(kernel: Kernel, name: str) -> torch.dtype:
    """Outputs with lanes have the type of the matrices, statistics are float32."""
    roles = kernel.division.roles
    lanes = set(roles.axes(kernel.division.plan.ranks_of(name))) & set(roles.lanes)
    return DTYPES[kernel.dot] if lanes and name in kernel.plan.outputs else torch.float32
