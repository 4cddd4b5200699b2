"""Attention of a compiled program as Triton kernels: what `--target triton` generates and loads again.

program -> kinds          each attention that differs from the others in shape or options
        -> cascade        its meaning as statements
        -> plan           folded, checked, kept in the plan cache
        -> kernel         by codegen/triton; layers of one kind share it
        -> bound          in place of the operator: new keys and values written, then the kernel
        -> files          the same as text, for people and for comparison; never run from there
"""

from .bound import bind
from .choosing import ChoosingKernel, choosing_kernels
from .files import differences, kernel_files
from .kernels import AttentionKernel, attention_kernels
from .kinds import AttentionKind

__all__ = [
    "AttentionKernel",
    "AttentionKind",
    "ChoosingKernel",
    "attention_kernels",
    "bind",
    "choosing_kernels",
    "differences",
    "kernel_files",
]
