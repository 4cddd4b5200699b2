"""Writing the kernels of an artifact: sources and plans always, compiled ones where they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ....ir.program import Program
from .cubins import compile_cubins
from .files import FOLDER, kernel_files
from .kernels import attention_kernels

Progress = Callable[[str, float], None]


def write_kernels(
    program: Program, folder: Path, architectures: Sequence[str], progress: Progress
) -> None:
    """Writes `kernels/` of an artifact. `architectures` are like "sm_90"; each takes seconds a kernel.

    Raises UnsupportedError, naming layers, for attention that has no kernel, or without Triton for cubins.
    """
    (folder / FOLDER).mkdir()
    for name, text in kernel_files(attention_kernels(program)).items():
        (folder / name).write_text(text, encoding="utf-8")
    for number, architecture in enumerate(architectures):
        progress(f"compiling kernels for {architecture}", number / len(architectures))
        for name, data in compile_cubins(program, architecture).items():
            (folder / name).write_bytes(data)
