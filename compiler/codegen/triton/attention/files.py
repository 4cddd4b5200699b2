"""Kernels as files of an artifact: the source and the plan of each, to be read and compared, never run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .....errors import ArtifactError, IRError
from ....ir.cascade.plan_text import parse_plan, print_plan
from .kernels import AttentionKernel

FOLDER = "kernels"


def kernel_files(kernels: Sequence[AttentionKernel]) -> dict[str, str]:
    """The text of each file by its name in the artifact."""
    found = {}
    for made in kernels:
        found[f"{FOLDER}/{made.name}.py"] = source_text(made)
        found[f"{FOLDER}/{made.name}.plan"] = print_plan(made.plan)
    return found


def source_text(made: AttentionKernel) -> str:
    """The generated source, with what it is for on top."""
    layers = ", ".join(map(str, made.layers))
    return (
        f"# Cached attention of layer{'s' if len(made.layers) > 1 else ''} {layers}.\n"
        "# This file is to be read: einfold makes the kernel anew from graph.eir, and runs nothing of this.\n"
        f"#\n{made.kernel.source}"
    )


def differences(expected: Mapping[str, str], files: Mapping[str, str]) -> list[str]:
    """The files of an artifact that are not what its graph gives, `expected`, each as the reason.

    Plans are read by the project's own parser, which evaluates nothing. Raises ArtifactError for a plan
    that does not read: no version of einfold wrote it.
    """
    found = []
    for name, text in files.items():
        if name.endswith(".plan"):
            try:
                same = print_plan(parse_plan(text)) == expected.get(name)
            except IRError as error:
                raise ArtifactError(f"{name} is no plan that einfold writes: {error}") from error
        else:
            same = text == expected.get(name)
        if not same:
            what = "is not what" if name in expected else "is none of what"
            found.append(f"{name} {what} this einfold makes of graph.eir")
    found += [f"{name} is missing" for name in expected if name not in files]
    return found
