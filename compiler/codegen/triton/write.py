"""Writing the kernels of an artifact: sources and plans always, compiled ones where they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...ir.program import Program
from .attention.choosing import choosing_kernels
from .attention.choosing_cubins import compile_cubins as compile_choosing
from .attention.cubins import compile_cubins
from .attention.files import FOLDER, kernel_files
from .attention.kernels import attention_kernels
from .linear.bound import linear_kernels
from .linear.cubins import compile_cubins as compile_products
from .linear.files import kernel_files as linear_files

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
        compiled = compile_cubins(program, architecture) | compile_products(products, architecture)
        compiled |= compile_choosing(choosing, architecture)
        for name, data in compiled.items():
            (folder / name).write_bytes(data)
