"""The weights of several programs in one file: what two of them read alike lies there once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...errors import IRError
from .program import Program
from .weights import Weight, WeightStore


def together(programs: Sequence[Program]) -> WeightStore:
    """One store of all weights, which take their data along: the programs keep the descriptions.

    Weights of one name, shape, type and data are one weight. Of those that differ in data the later program's
    has another name from then on, in its graph too.
    """
    if len(programs) == 1:
        return programs[0].weights
    store = WeightStore()
    for program in programs:
        for name in list(program.weights):
            weight, kept = program.weights[name], name
            if name not in store or not _same(store[name], weight):
                kept = store.add(name, weight)
            if kept != name:
                _rename(program, name, kept)
            program.weights.release(kept)
    return store


def _same(one: Weight, other: Weight) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    try:
        return torch.equal(one.load(), other.load())
    except IRError:  # known by their shapes alone, where only sizes are wanted
        return True


def _rename(program: Program, old: str, new: str) -> None:
    program.weights.add(new, program.weights[old])
    program.weights.discard(old)
    for node in program.graph.find_nodes(op="get_attr", target=old):
        node.target = new


__all__ = ["together"]
