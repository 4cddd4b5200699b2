"""Compiled kernels of attention that an artifact brings, for those who trust it (`shipped.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..ahead import signature_of
from ..shipped import Dispatch, Shipped, shipped
from .cubins import key_of, variants
from .files import FOLDER
from .kernels import AttentionKernel


def with_compiled(
    kernels: Sequence[AttentionKernel], architecture: str, files: Mapping[str, Path]
) -> tuple[list[AttentionKernel], list[str]]:
    """The kernels with what `files`, by name in the artifact, has compiled for this GPU; and what it lacks.

    Raises ArtifactError for a file that does not read.
    """
    found, missing = [], []
    for made in kernels:
        ones: dict[str, list[Shipped]] = {kind: [] for kind in made.kernel.functions}
        for variant in variants(made):
            stem = f"{FOLDER}/{made.name}.{architecture}.{variant.name}"
            generated, function = (
                made.kernel.functions[variant.kind],
                made.kernel.function(variant.kind),
            )
            known = {"STREAM": 0, "PARTS": 0, **variant.constants}
            signature = signature_of(made.kernel, generated, known)
            names = [argument.name for argument in generated.arguments]
            one = shipped(files, stem, key_of(made, variant), function, signature, names)
            if one is None:
                missing.append(f"{stem}.cubin")
            else:
                ones[variant.kind].append(one)
        functions = {
            made.kernel.functions[kind].name: Dispatch(tuple(of_kind), made.kernel.function(kind))
            for kind, of_kind in ones.items()
        }
        found.append(replace(made, kernel=replace(made.kernel, _loaded=functions)))
    return found, missing
