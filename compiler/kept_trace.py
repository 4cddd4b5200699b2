"""What a trace gave, kept in the user's cache folder: a model is traced once for all that is tried on it.

Tracing is most of what `estimate` and `plan` take, and of a compile that solves nothing. It depends on the
module and on code alone, never on weights, so a trace is found again by the module's identity
(`identity.py`) and the versions of what traces.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from blake3 import blake3
from torch import Tensor

from ..errors import pass_on
from .frontend.export import capture_language_model, weights_from
from .frontend.huggingface import ModelSource
from .frontend.structure import structure
from .identity import identity, versions
from .ir.kept import cache_home, drop_oldest, read_tensors, write_tensors
from .ir.parser import parse
from .ir.printer import print_program
from .ir.program import Program
from .ir.weights import Weight

#: Traces that are kept, and the most bytes of numbers that are kept with one, such as rotary frequencies.
_KEPT, _NUMBERS = 64, 1 << 26

State = Mapping[str, Tensor | Weight]


def trace_language_model(
    source: ModelSource,
    config: Any,
    context: int,
    state: State | None = None,
    module: Any = None,
    embeds: bool = False,
) -> Program:
    """As `capture_language_model`, from the user's cache folder where the trace is there."""
    given = (source, config, context, state, module, embeds)
    if embeds:  # what is traced then takes a table beside tokens
        return capture_language_model(*given)
    skeleton = structure(source, config, state, module)
    named = identity(skeleton, numbers=False)
    if named is None:
        return capture_language_model(*given)
    name = blake3(repr((versions(Path(__file__).parent), named)).encode()).hexdigest()[:32]
    path = cache_home() / "traces" / name / "trace.pt"
    found = _read(path, context, source, state)
    if found is None:
        parameters = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
        found = capture_language_model(*given, skeleton)
        _keep(path, found, parameters)
    return found


def _keep(path: Path, program: Program, parameters: set[str]) -> None:
    """Writes the graph and what it reads that is no parameter, where these have a form on disk."""
    own = {name: program.weights[name] for name in program.weights if name not in parameters}
    if sum(weight.nbytes for weight in own.values()) > _NUMBERS:
        return
    try:
        text = print_program(program)
    except (
        Exception
    ) as error:  # an argument without a textual form: such a model is traced each time
        pass_on(error)
        return
    numbers = {name: weight.load() for name, weight in own.items()}
    if write_tensors(path, {"of": path.parent.name, "program": text, "numbers": numbers}):
        drop_oldest(path.parent.parent.iterdir(), _KEPT)


def _read(path: Path, context: int, source: ModelSource, state: State | None) -> Program | None:
    """The program for these weights; None where there is none, or not as it was written."""
    data = read_tensors(path)
    if data is None:
        return None

    try:
        if data["of"] != path.parent.name:
            return None
        weight = weights_from(source, state, data["numbers"])

        def load(name: str, declared: Weight) -> Weight:
            found = weight(name, declared.shape, declared.dtype)
            if found.shape != declared.shape:
                raise ValueError
            return found

        program = parse(data["program"], load, any_operator=True)
    except Exception as error:  # of another form, or weights that are not the module's
        pass_on(error)
        return None
    with suppress(OSError):
        os.utime(path.parent)  # the last to be dropped now
    program.model = replace(program.model, context=context)
    return program
