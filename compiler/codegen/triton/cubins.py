"""Kernels that are texts of einfold's own compiled ahead of time, as files of an artifact, a function a GPU.

Those that are generated from a plan have `attention/cubins.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from .ahead import Assembled, Signature, assemble
from .shipped import FOLDER, Wanted, dispatched, files_of, key_of


class TextKernel(Protocol):
    """What is asked of a kernel: a frozen dataclass, whose field `_loaded` takes its compiled functions."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def functions(self) -> Sequence[str]: ...

    def function(self, name: str) -> Any: ...

    def arguments(self, name: str) -> list[str]: ...


@dataclass(frozen=True)
class Variant:
    """One compiled function: its name as a file, the function, and the constants that a launch asks for."""

    name: str
    function: str
    constants: Mapping[str, Any]


def signature(
    names: Sequence[str],
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Container[str],
) -> Signature:
    """The types of arguments by their names: a tensor's where `pointers` has one, else i32. Addresses are
    multiples of 16, and so are those that are `aligned`."""
    types = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in names}
    own = {name: value for name, value in constants.items() if name.isupper()}
    whole = [at for at, name in enumerate(names) if name in pointers or name in aligned]
    attributes = {(at,): [["tt.divisibility", 16]] for at in whole}
    return types | dict.fromkeys(own, "constexpr"), own, attributes


K = TypeVar("K", bound=TextKernel)


@dataclass(frozen=True)
class Cubins(Generic[K]):
    """Compiled functions of kernels of one sort: what is compiled of a kernel, and the types of a function's
    arguments, its constants, and which arguments are multiples of 16."""

    variants: Callable[[K], Iterable[Variant]]
    signature_of: Callable[[K, Variant], Signature]

    def compiled(self, kernel: K, variant: Variant, capability: int) -> Assembled:
        """One function compiled with no GPU. Raises UnsupportedError without Triton, or where it refuses."""
        return assemble(
            kernel.function(variant.function),
            f"{kernel.name}.{variant.name}",
            self.signature_of(kernel, variant),
            capability,
            variant.constants["num_warps"],
            variant.constants["num_stages"],
        )

    def files(self, kernels: Sequence[K], architecture: str) -> dict[str, bytes]:
        """The files of kernels for a GPU such as "sm_90". Raises as `compiled`."""
        capability = int(architecture.removeprefix("sm_"))
        found: dict[str, bytes] = {}
        for kernel in kernels:
            for variant in self.variants(kernel):
                made = self.compiled(kernel, variant, capability)
                wanted = self._wanted(kernel, variant, architecture)
                found |= files_of(wanted.stem, made, wanted.key)
        return found

    def given(
        self, kernels: Sequence[K], architecture: str, files: Mapping[str, Path]
    ) -> tuple[list[K], list[str]]:
        """The kernels with what `files` has compiled for this GPU, and what it lacks.

        Raises ArtifactError for a file that does not read.
        """
        found, missing = [], []
        for kernel in kernels:
            functions = {name: kernel.function(name) for name in kernel.functions}
            variants = self.variants(kernel)
            wanted = (self._wanted(kernel, variant, architecture) for variant in variants)
            loaded, lacking = dispatched(files, functions, wanted)
            found.append(replace(kernel, _loaded=loaded))  # type: ignore[type-var]
            missing += lacking
        return found, missing

    def _wanted(self, kernel: K, variant: Variant, architecture: str) -> Wanted:
        return Wanted(
            f"{FOLDER}/{kernel.name}.{architecture}.{variant.name}",
            variant.function,
            key_of(kernel.source, variant.name, variant.constants),
            self.signature_of(kernel, variant),
            kernel.arguments(variant.function),
        )
