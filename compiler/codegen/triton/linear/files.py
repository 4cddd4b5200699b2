"""Kernels of products as files of an artifact: the source of each, to be read and compared, never run."""

from __future__ import annotations

from collections.abc import Sequence

from ..shipped import FOLDER, text_of
from .kernels import LinearKernel


def kernel_files(kernels: Sequence[LinearKernel]) -> dict[str, str]:
    """The text of each file by its name in the artifact."""
    return {
        f"{FOLDER}/{kernel.name}.py": text_of("Products with stored weights", kernel.source)
        for kernel in kernels
    }
