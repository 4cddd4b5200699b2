"""What rotations share: weights that are changed for the one call that reads them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from ...ir.program import Editor, Program, call_arguments, reads_alone
from ...ir.stored import StoredWeight, TurnedWeight
from ...ir.weights import derive
from ...solve.solver import numbers_of
from ..base import place_of

#: A row whose largest power of two is smaller has no matrix that mixes it cheaply.
_SMALLEST = 8


class NotTurnedError(Exception):
    """Why something cannot be turned, in a sentence."""


def check_width(width: int) -> None:
    """Raises NotTurnedError for rows that no matrix mixes cheaply."""
    if width & -width < _SMALLEST:
        raise NotTurnedError(
            f"{width} channels have no power of two that a matrix could mix them by"
        )


def check_alone(program: Program, call: fx.Node, *names: str) -> None:
    """Raises NotTurnedError where what a call reads by these names cannot be changed for it alone."""
    found = call_arguments(call)
    for read in filter(None, map(found.get, names)):
        if not reads_alone(read):
            raise NotTurnedError(f"the weights of {place_of(call)} are read elsewhere too")
        weight = program.weights[str(read.target)]
        if isinstance(weight, (StoredWeight, TurnedWeight)):
            raise NotTurnedError(
                f"the weight of {place_of(call)} comes in codes, which turning would lose"
            )


def sound(program: Program, name: str) -> Callable[[], Tensor]:
    """Loads a weight as it came. It raises ModelError for numbers that turning would spread, and that were
    found under another name then."""
    load = program.weights[name].load
    return lambda: numbers_of(name, load())


def change_weight(
    editor: Editor, call: fx.Node, name: str, change: Callable[[Tensor], Tensor]
) -> None:
    """Has a call read a changed weight of the same shape, where it has one of that name."""
    read = call_arguments(call)[name]
    if read is None:
        return
    program = editor.program
    weight, load = program.weights[str(read.target)], sound(program, str(read.target))
    (changed,) = derive([(weight.shape, weight.dtype)], lambda: [change(load())])
    stem, dot, last = str(read.target).rpartition(".")
    with editor.before(call):
        call.replace_input_with(read, editor.weight(f"{stem}{dot}turned.{last}", changed))


def check_type(value: fx.Node) -> None:
    """Raises NotTurnedError for a value that its matrices would not fit."""
    if (kind := value.meta["val"].dtype) is not torch.float32:
        raise NotTurnedError(
            f"it is computed in {str(kind).removeprefix('torch.')}, not in float32"
        )
