"""Kernels as files of an artifact: the source and the plan of each, to be read and compared, never run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .....errors import ArtifactError, IRError
from ....ir.cascade.plan_text import parse_plan, print_plan
from ..shipped import FOLDER, text_of
from .choosing import ChoosingKernel
from .kernels import AttentionKernel


def kernel_files(
    kernels: Sequence[AttentionKernel], choosing: Sequence[ChoosingKernel] = ()
) -> dict[str, str]:
    """The text of each file by its name in the artifact. Kernels that choose pages have no plan."""
    found = {}
    for made in kernels:
        text = _headed("Cached attention", made.layers, made.kernel.source)
        found[f"{FOLDER}/{made.name}.py"] = text
        found[f"{FOLDER}/{made.name}.plan"] = print_plan(made.plan)
    for each in choosing:
        text = _headed("The choice of pages", each.layers, each.source)
        found[f"{FOLDER}/{each.name}.py"] = text
    return found


def _headed(what: str, layers: Sequence[int], source: str) -> str:
    """A source, with what it is for on top."""
    return text_of(
        f"{what} of layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}", source
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
