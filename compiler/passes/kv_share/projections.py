"""Drops the rows of fused projections that nothing reads any more."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from ...ir.ops import einfold_ops
from ...ir.program import Editor, Program, call_arguments
from ...ir.weights import derive

aten = torch.ops.aten


def narrow_projections(program: Program) -> None:
    """Linears of which only some parts of a split are read compute these alone.

    Before: `%y = linear(%x, %wqkv); %q, %k, %v = split_with_sizes(%y, [..], -1)`, with k and v unread
    After:  `%q = linear(%x, %wq)`
    """
    editor = Editor(program)
    for split in program.nodes(aten.split_with_sizes.default):
        linear, sizes, *_ = split.args
        if not isinstance(linear, fx.Node) or linear.target is not einfold_ops.linear.default:
            continue
        parts = {int(user.args[1]): user for user in split.users if user.target is operator.getitem}  # type: ignore[arg-type]
        live = sorted(index for index, part in parts.items() if part.users)
        if len(linear.users) == 1 and 0 < len(live) < len(sizes):  # type: ignore[arg-type]
            _narrow(program, editor, split, {index: parts[index] for index in live})


def _narrow(program: Program, editor: Editor, split: fx.Node, live: dict[int, fx.Node]) -> None:
    linear: fx.Node = split.args[0]  # type: ignore[assignment]
    sizes: list[int] = list(split.args[1])  # type: ignore[arg-type]
    found = call_arguments(linear)
    reads = [found["weight_NM"], found["bias"]]
    with editor.before(split):
        for index, part in live.items():
            first = sum(sizes[:index])
            kept = [
                None if read is None else _rows(program, editor, read, first, sizes[index])
                for read in reads
            ]
            editor.replace(part, editor.call(einfold_ops.linear.default, found["x"], *kept))
    for user in list(split.users):
        program.graph.erase_node(user)
    for node in (split, linear):
        program.graph.erase_node(node)
    for read in reads:
        if read is not None and not read.users:
            program.graph.erase_node(read)
            program.weights.discard(str(read.target))


def _rows(program: Program, editor: Editor, read: fx.Node, first: int, count: int) -> fx.Node:
    """A weight of some rows of another."""
    whole = program.weights[str(read.target)]
    shape = (count, *whole.shape[1:])

    def compute() -> tuple[Tensor]:
        return (whole.load()[first : first + count].clone(),)

    (part,) = derive([(shape, whole.dtype)], compute)
    return editor.weight(f"{read.target}.rows{first}", part)
