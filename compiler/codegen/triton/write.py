"""Writing the kernels of an artifact: sources and plans always, compiled ones where they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...ir.program import Program
from .attention.choosing import choosing_kernels
from .attention.choosing_cubins import CHOICES
from .attention.cubins import compile_cubins
from .attention.files import kernel_files
from .attention.kernels import attention_kernels
from .linear.bound import linear_kernels
from .linear.cubins import PRODUCTS
from .linear.files import kernel_files as linear_files
from .shipped import FOLDER

Progress = Callable[[str, float], None]


def write_kernels(
    program: Program, folder: Path, architectures: Sequence[str], progress: Progress
) -> None:
    """Writes `kernels/` of an artifact. `architectures` are like "sm_90"; each takes seconds a kernel.

    Raises UnsupportedError, naming layers, for attention that has no kernel, or without Triton for cubins.
    """
    (folder / FOLDER).mkdir()
    choosing, products = choosing_kernels(program), linear_kernels(program)
    kernels = attention_kernels(program)
    texts = {**kernel_files(kernels, choosing), **linear_files(products)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for number, architecture in enumerate(architectures):
        progress(f"compiling kernels for {architecture}", number / len(architectures))
        compiled = compile_cubins(program, architecture) | PRODUCTS.files(products, architecture)
        compiled |= CHOICES.files(choosing, architecture)
        for name, data in compiled.items():
            (folder / name).write_bytes(data)
