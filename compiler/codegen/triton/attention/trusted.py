"""Compiled kernels of attention that an artifact brings, for those who trust it (`shipped.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..ahead import signature_of
from ..shipped import Wanted, dispatched
from .cubins import Variant, key_of, stem_of, variants
from .kernels import AttentionKernel


def with_compiled(
    kernels: Sequence[AttentionKernel], architecture: str, files: Mapping[str, Path]
) -> tuple[list[AttentionKernel], list[str]]:
    """The kernels with what `files`, by name in the artifact, has compiled for this GPU; and what it lacks.

    Raises ArtifactError for a file that does not read.
    """
    found, missing = [], []
    for made in kernels:
        kernel = made.kernel
        functions = {kind: kernel.function(kind) for kind in kernel.functions}
        wanted = (_wanted(made, variant, architecture) for variant in variants(made))
        loaded, lacking = dispatched(files, functions, wanted)
        by_name = {kernel.functions[kind].name: each for kind, each in loaded.items()}
        found.append(replace(made, kernel=replace(kernel, _loaded=by_name)))
        missing += lacking
    return found, missing


def _wanted(made: AttentionKernel, variant: Variant, architecture: str) -> Wanted:
    generated = made.kernel.functions[variant.kind]
    known = {"STREAM": 0, "PARTS": 0, **variant.constants}
    return Wanted(
        stem_of(made, variant, architecture),
        variant.kind,
        key_of(made, variant),
        signature_of(made.kernel, generated, known),
        [argument.name for argument in generated.arguments],
    )
