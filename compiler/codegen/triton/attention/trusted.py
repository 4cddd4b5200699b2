"""Compiled kernels that an artifact brings, for those who trust it: machine code is not checked by anything.

A compiled function serves the launches that it was compiled for: its tiles, tensors whose last stride is 1
and whose addresses are aligned. Any other launch goes to the function that is made from the graph.
Written against Triton's own loader; it has not run on a GPU yet.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .....errors import ArtifactError, pass_on
from ..ahead import signature_of
from ..kernel import Kernel
from .cubins import OWN, Variant, key_of, variants
from .files import FOLDER
from .kernels import AttentionKernel


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


def with_compiled(
    kernels: Sequence[AttentionKernel], architecture: str, files: Mapping[str, Path]
) -> tuple[list[AttentionKernel], list[str]]:
    """The kernels with what `files`, by name in the artifact, has compiled for this GPU; and what it lacks.

    Raises ArtifactError for a file that does not read.
    """
    found, missing = [], []
    for made in kernels:
        shipped: dict[str, list[Shipped]] = {kind: [] for kind in made.kernel.functions}
        for variant in variants(made):
            stem = f"{FOLDER}/{made.name}.{architecture}.{variant.name}"
            one = _shipped(made, variant, files.get(f"{stem}.json"), files.get(f"{stem}.cubin"))
            if one is None:
                missing.append(f"{stem}.cubin")
            else:
                shipped[variant.kind].append(one)
        functions = {
            made.kernel.functions[kind].name: Dispatch(tuple(ones), made.kernel.function(kind))
            for kind, ones in shipped.items()
        }
        found.append(replace(made, kernel=replace(made.kernel, _loaded=functions)))
    return found, missing


def _shipped(
    made: AttentionKernel, variant: Variant, metadata: Path | None, code: Path | None
) -> Shipped | None:
    """The compiled function, or None where it is absent or of another source or Triton."""
    if metadata is None or code is None:
        return None
    try:
        key = json.loads(metadata.read_text(encoding="utf-8"))[OWN]
    except (OSError, ValueError, KeyError, TypeError) as error:
        pass_on(error)
        raise ArtifactError(f"{metadata} does not describe a compiled kernel: {error}") from error
    if key != key_of(made, variant):
        return None
    return _handle(made.kernel, variant, metadata, code)


def _handle(kernel: Kernel, variant: Variant, metadata: Path, code: Path) -> Shipped:
    from triton.compiler import ASTSource, CompiledKernel

    generated = kernel.functions[variant.kind]
    known = {"STREAM": 0, "PARTS": 0, **variant.constants}
    signature, constants, attributes = signature_of(kernel, generated, known)
    source = ASTSource(kernel.function(variant.kind), signature, constants, attributes)
    group = {metadata.name: str(metadata), code.name: str(code)}
    names = [argument.name for argument in generated.arguments]
    return Shipped(
        variant.constants,
        frozenset(names.index(name) for name in constants if name in names),
        frozenset(at for (at,) in attributes),
        tuple(name for name in signature if name not in names),
        CompiledKernel(source, group, code.stem),
    )


def _address(value: Any) -> int:
    return int(value.data_ptr()) if isinstance(value, Tensor) else int(value)
