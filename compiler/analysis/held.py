"""What a process that runs an artifact holds beside weights, cache and activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ir.program import Program

#: Bytes that a process takes before it reads a weight: Python, NumPy, and the engine with its libraries.
#: Measured: 80 to 100 MB with onnxruntime 1.31, 420 to 450 with torch 2.13.
_PROCESS = {"onnx": 120_000_000, "reference": 480_000_000, "triton": 480_000_000}

#: Copies that onnxruntime packs, as a share of the weights in the file. Of integers both stay resident (139
#: MB of memory for 96 MB of int4); of float16 the copy is float32, and the file's pages go.
_PACKED = {torch.int8: 0.6, torch.uint8: 0.6, torch.float16: 1.0}

#: Its arena grows by doubling: a step may leave twice its activations in it beside them.
_ARENA = 2


@dataclass(frozen=True)
class Held:
    """Bytes beside weights, cache and activations."""

    process: int
    packed: int
    arena: int
    """Bytes held for each byte of activations."""

    def runtime(self, activations: int) -> int:
        """The runtime's own copies of weights, and what its arena keeps."""
        return self.packed + self.arena * activations


def held(program: Program, target: str) -> Held:
    """What the runtime of a target holds beside what a program says.

    Of float32 weights the mapped pages of the file go as onnxruntime packs its copies: there is one of each.
    """
    if target != "onnx":
        return Held(_PROCESS[target], 0, 0)
    weights = [program.weights[name] for name in program.weights]
    packed = sum(_PACKED.get(weight.dtype, 0.0) * weight.nbytes for weight in weights)
    return Held(_PROCESS[target], int(packed), _ARENA)
