"""Compiled functions that an artifact brings, for those who trust it: nothing checks machine code.

A compiled function serves the launches that it was compiled for: its constants, tensors whose last stride is
1 and whose addresses are aligned. Any other launch goes to the function that is made from the graph.
Written against Triton's own loader; it has not run on a GPU yet.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from torch import Tensor

from ....errors import ArtifactError, pass_on
from .ahead import Assembled, Signature

#: Where an artifact has its kernels.
FOLDER = "kernels"

#: The entry of a function's metadata that is not Triton's.
OWN = "einfold"


@dataclass(frozen=True)
class Shipped:
    """A compiled function, the constants and arguments that it is for, and Triton's handle of it."""

    constants: Mapping[str, int]
    unit: frozenset[int]
    """Arguments that are 1."""
    aligned: frozenset[int]
    """Arguments that are multiples of 16; addresses, for tensors."""
    order: tuple[str, ...]
    """Constants that follow the arguments."""
    handle: Any

    def serves(self, values: Sequence[Any], constants: Mapping[str, Any]) -> bool:
        """Whether a launch is one that it was compiled for."""
        return (
            all(constants.get(name) == value for name, value in self.constants.items())
            and all(values[at] == 1 for at in self.unit)
            and all(_address(values[at]) % 16 == 0 for at in self.aligned)
            and all(isinstance(v, Tensor) or abs(v) < 2**31 for v in values)
        )

    def launch(self, grid: Sequence[int], values: Sequence[Any]) -> None:
        """Runs it on a grid of up to three axes."""
        places = (*grid, 1, 1)[:3]
        self.handle[places](*values, *(self.constants[name] for name in self.order))


@dataclass(frozen=True)
class Dispatch:
    """Stands for a Triton function, `f[grid](*values, **constants)`; compiled ones serve what they can."""

    compiled: tuple[Shipped, ...]
    otherwise: Any

    def __getitem__(self, grid: Sequence[int]) -> Any:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: Sequence[int], *values: Any, **constants: Any) -> None:
        for one in self.compiled:
            if one.serves(values, constants):
                one.launch(grid, values)
                return
        self.otherwise[grid](*values, **constants)


def key_of(source: str, kind: str, constants: Mapping[str, Any]) -> dict[str, Any]:
    """What a compiled function must have been made from: this source, these constants, this Triton."""
    return {
        "triton": triton_version(),
        "source": blake3(source.encode()).hexdigest(),
        "kind": kind,
        "constants": dict(constants),
    }


def triton_version() -> str:
    """The version of Triton that is installed; UnsupportedError where none is."""
    from .kernel import triton_module

    return str(triton_module().__version__)


def text_of(title: str, source: str) -> str:
    """The text of a kernel's source as a file."""
    return (
        f"# {title}.\n"
        "# This file is to be read: einfold makes the kernel anew from graph.eir, and runs nothing of this.\n"
        f"#\n{source}"
    )


def files_of(stem: str, made: Assembled, key: Mapping[str, Any]) -> dict[str, bytes]:
    """The two files of a compiled function: its code, and what a loader wants to know of it."""
    metadata = json.dumps({**made.metadata, OWN: key}, indent=1, sort_keys=True)
    return {f"{stem}.cubin": made.cubin, f"{stem}.json": metadata.encode()}


@dataclass(frozen=True)
class Wanted:
    """A compiled function that a kernel would use: the files' name without ending, which of the kernel's
    functions it is of, and what it must have been made from. `names` are its arguments without constants."""

    stem: str
    function: str
    key: Mapping[str, Any]
    signature: Signature
    names: Sequence[str]


def dispatched(
    files: Mapping[str, Path], functions: Mapping[str, Any], wanted: Iterable[Wanted]
) -> tuple[dict[str, Dispatch], list[str]]:
    """(a kernel's functions, each with what `files`, by name in the artifact, has compiled of it; what they
    lack).

    Raises ArtifactError for a file that does not read.
    """
    found: dict[str, list[Shipped]] = {name: [] for name in functions}
    missing = []
    for each in wanted:
        one = _shipped(files, each, functions[each.function])
        if one is None:
            missing.append(f"{each.stem}.cubin")
        else:
            found[each.function].append(one)
    return {name: Dispatch(tuple(of), functions[name]) for name, of in found.items()}, missing


def _shipped(files: Mapping[str, Path], wanted: Wanted, function: Any) -> Shipped | None:
    """What `files` has compiled of a function; None for none of the key."""
    from triton.compiler import ASTSource, CompiledKernel

    metadata, code = files.get(f"{wanted.stem}.json"), files.get(f"{wanted.stem}.cubin")
    if metadata is None or code is None:
        return None
    try:
        found = json.loads(metadata.read_text(encoding="utf-8"))[OWN]
    except (OSError, ValueError, KeyError, TypeError) as error:
        pass_on(error)
        raise ArtifactError(f"{metadata} does not describe a compiled kernel: {error}") from error
    if found != wanted.key:
        return None
    types, constants, attributes = wanted.signature
    names = wanted.names
    group = {metadata.name: str(metadata), code.name: str(code)}
    return Shipped(
        wanted.key["constants"],
        frozenset(names.index(name) for name in constants if name in names),
        frozenset(at for (at,) in attributes),
        tuple(name for name in types if name not in names),
        CompiledKernel(ASTSource(function, *wanted.signature), group, code.stem),
    )


def _address(value: Any) -> int:
    return int(value.data_ptr()) if isinstance(value, Tensor) else int(value)
