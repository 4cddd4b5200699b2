"""Kernels that choose pages compiled ahead of time as files of an artifact, as `cubins.py` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..ahead import Assembled, Signature, assemble
from ..shipped import Wanted, dispatched, files_of, key_of
from .choosing import ChoosingKernel
from .files import FOLDER

#: The types of tensors, but for the query's and those of the slots.
_POINTERS = {"used": "i32", "key_scale": "fp32", "uppers": "fp32", "tops": "fp32", "totals": "fp32"}
_POINTERS |= {"orders": "i64", "chosen": "i32"}


def signature_of(made: ChoosingKernel, function: str) -> Signature:
    """The types of a function's arguments, its constants, and that addresses are multiples of 16, and strides
    where a key's size is."""
    kind, names = made.kind, made.arguments(function)
    pointers = {**_POINTERS, "query": kind.query, "keys": kind.bounds, "bounds": kind.bounds}
    types = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in names}
    constants = {name: value for name, value in made.constants(function).items() if name.isupper()}
    strides = [name for name in names if "_" in name] if kind.key_size % 16 == 0 else []
    aligned = [at for at, name in enumerate(names) if name in {*pointers, *strides}]
    attributes = {(at,): [["tt.divisibility", 16]] for at in aligned}
    return types | dict.fromkeys(constants, "constexpr"), constants, attributes


def compile_function(made: ChoosingKernel, function: str, capability: int) -> Assembled:
    """One function compiled with no GPU. Raises UnsupportedError without Triton, or where it refuses."""
    constants = made.constants(function)
    return assemble(
        made.function(function),
        f"{made.name}.{function}",
        signature_of(made, function),
        capability,
        constants["num_warps"],
        constants["num_stages"],
    )


def compile_cubins(kernels: Sequence[ChoosingKernel], architecture: str) -> dict[str, bytes]:
    """The files of kernels for a GPU such as "sm_90". Raises as `compile_function`."""
    capability = int(architecture.removeprefix("sm_"))
    found: dict[str, bytes] = {}
    for made in kernels:
        for function in made.functions:
            compiled = compile_function(made, function, capability)
            wanted = _wanted(made, function, architecture)
            found |= files_of(wanted.stem, compiled, wanted.key)
    return found


def _wanted(made: ChoosingKernel, function: str, architecture: str) -> Wanted:
    return Wanted(
        f"{FOLDER}/{made.name}.{architecture}.{function}",
        function,
        key_of(made.source, function, made.constants(function)),
        signature_of(made, function),
        made.arguments(function),
    )


def with_compiled(
    kernels: Sequence[ChoosingKernel], architecture: str, files: Mapping[str, Path]
) -> tuple[list[ChoosingKernel], list[str]]:
    """The kernels with what `files` has compiled for this GPU, and what it lacks.

    Raises ArtifactError for a file that does not read.
    """
    found, missing = [], []
    for made in kernels:
        functions = {name: made.function(name) for name in made.functions}
        wanted = (_wanted(made, function, architecture) for function in made.functions)
        loaded, lacking = dispatched(files, functions, wanted)
        found.append(replace(made, _loaded=loaded))
        missing += lacking
    return found, missing
