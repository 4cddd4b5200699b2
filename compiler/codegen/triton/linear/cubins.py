"""Kernels of products compiled ahead of time as files of an artifact, as `attention/cubins.py` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..ahead import Assembled, Signature, assemble
from ..shipped import Wanted, dispatched, files_of, key_of
from .files import FOLDER
from .kernels import MERGED, LinearKernel, tiles_of


@dataclass(frozen=True)
class Variant:
    """One compiled function: its name as a file, the function, and the constants that a launch asks for."""

    name: str
    function: str
    constants: Mapping[str, Any]


def variants(kernel: LinearKernel) -> Iterator[Variant]:
    """What is compiled: each tile, for results and for the sums of a part, and the merge of these."""
    if kernel.kind.integers:
        yield Variant("quantize", "quantize", MERGED)
    for most, tile in tiles_of(kernel.kind).items():
        function = "matvec" if most == 1 else "matmul"
        for whole in (True, False):
            name = f"{function}{'' if most == 1 else most}{'' if whole else '_part'}"
            yield Variant(name, function, {**tile.constants, "WHOLE": whole})
    yield Variant("merge", "merge", MERGED)


def signature_of(kernel: LinearKernel, variant: Variant) -> Signature:
    """The types of a function's arguments, its constants, and that addresses and rows are multiples of 16."""
    kind = kernel.kind
    sums, codes = ("i32", "u8") if kind.integers else ("fp32", "i32")
    result = kind.type if variant.constants.get("WHOLE", True) else sums
    pointers = {
        "units": kind.stored["scales"],
        **kind.stored,
        "x": kind.type,
        "inputs": "i8",
        "sizes": "fp32",
        "codes": codes,
        "bias": kind.bias,
        "y": result,
        "sums": sums,
    }
    names = kernel.arguments(variant.function)
    types = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in names}
    constants = {name: value for name, value in variant.constants.items() if name.isupper()}
    known = {*pointers, "outs", "width", "columns"}
    aligned = [at for at, name in enumerate(names) if name in known]
    attributes = {(at,): [["tt.divisibility", 16]] for at in aligned}
    return types | dict.fromkeys(constants, "constexpr"), constants, attributes


def compile_variant(kernel: LinearKernel, variant: Variant, capability: int) -> Assembled:
    """One function compiled with no GPU. Raises UnsupportedError without Triton, or where it refuses."""
    return assemble(
        kernel.function(variant.function),
        f"{kernel.name}.{variant.name}",
        signature_of(kernel, variant),
        capability,
        variant.constants["num_warps"],
        variant.constants["num_stages"],
    )


def compile_cubins(kernels: Sequence[LinearKernel], architecture: str) -> dict[str, bytes]:
    """The files of kernels for a GPU such as "sm_90". Raises as `compile_variant`."""
    capability = int(architecture.removeprefix("sm_"))
    found: dict[str, bytes] = {}
    for kernel in kernels:
        for variant in variants(kernel):
            made = compile_variant(kernel, variant, capability)
            wanted = _wanted(kernel, variant, architecture)
            found |= files_of(wanted.stem, made, wanted.key)
    return found


def _wanted(kernel: LinearKernel, variant: Variant, architecture: str) -> Wanted:
    return Wanted(
        f"{FOLDER}/{kernel.name}.{architecture}.{variant.name}",
        variant.function,
        key_of(kernel.source, variant.name, variant.constants),
        signature_of(kernel, variant),
        kernel.arguments(variant.function),
    )


def with_compiled(
    kernels: Sequence[LinearKernel], architecture: str, files: Mapping[str, Path]
) -> tuple[list[LinearKernel], list[str]]:
    """The kernels with what `files` has compiled for this GPU, and what it lacks.

    Raises ArtifactError for a file that does not read.
    """
    found, missing = [], []
    for kernel in kernels:
        functions = {name: kernel.function(name) for name in kernel.functions}
        wanted = (_wanted(kernel, variant, architecture) for variant in variants(kernel))
        loaded, lacking = dispatched(files, functions, wanted)
        found.append(replace(kernel, _loaded=loaded))
        missing += lacking
    return found, missing
