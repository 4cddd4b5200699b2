"""Kernels of products as files of an artifact: the source of each, to be read and compared, never run."""

from __future__ import annotations

from collections.abc import Sequence

from .kernels import LinearKernel

FOLDER = "kernels"


def kernel_files(kernels: Sequence[LinearKernel]) -> dict[str, str]:
    """The text of each file by its name in the artifact."""
    return {
        f"{FOLDER}/{kernel.name}.py": (
            "# Products with stored weights.\n"
            "# This file is to be read: einfold makes the kernel anew from graph.eir, and runs nothing of "
            f"this.\n#\n{kernel.source}"
        )
        for kernel in kernels
    }
