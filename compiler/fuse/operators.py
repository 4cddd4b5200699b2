"""Attention that is an operator of the IR already, in the report: its meaning is folded as any region is.

A causal language model's attention comes through transformers' interface, layer by layer, and becomes one
operator; it is not searched for. What it computes, in how many passes, is asked of the same importer.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, fx

from ...errors import UnsupportedError
from ..frontend.cascade.meaning import import_meaning
from ..ir.ops.attention import Attention
from ..ir.program import Program, attention_nodes, call_arguments
from .folded import Folded, folded
from .report import AS_WRITTEN, FusedCascade, entry


def operator_entries(program: Program, lowering: str) -> list[FusedCascade]:
    """An entry for each attention operator of a captured model, in the order of its layers.

    `lowering` is what the report calls what runs.
    """
    known: dict[str, Folded | str] = {}
    entries = []
    for node in attention_nodes(program):
        kind = _kind(program, node)
        if kind not in known:
            try:
                known[kind] = _folded(program, node)
            except UnsupportedError as error:
                known[kind] = f"its meaning is no cascade: {error}"
        meaning = known[kind]
        if isinstance(meaning, str):
            found = entry(node, None, AS_WRITTEN, meaning)
        else:
            found = entry(node, meaning, lowering, "")
        if found.where == node.name:
            found = replace(found, where=f"layer {call_arguments(node)['layer']}")
        entries.append(found)
    return entries


def _folded(program: Program, node: fx.Node) -> Folded:
    arguments = {name: _value(found) for name, found in call_arguments(node).items()}
    imported = import_meaning(
        lambda **given: (Attention(**given).run(),), arguments, program.shapes.mode
    )
    return folded(imported)


def _kind(program: Program, node: fx.Node) -> str:
    """All that the meaning depends on: equal for layers that differ in their number alone."""
    found = {name: _value(value) for name, value in call_arguments(node).items() if name != "layer"}
    shown = {
        name: program.shapes.describe(value) if isinstance(value, Tensor) else value
        for name, value in found.items()
    }
    return repr(shown)


def _value(argument: object) -> object:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument
