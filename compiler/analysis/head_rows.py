"""Which rows of a projection make the heads that an attention reads, and which linear reads what it gives."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.ops import einfold_ops
from ..ir.program import Program

aten = torch.ops.aten

#: The named sizes while heads are followed: all that matters is the last axes.
_ONE = {"B": 1, "S": 1, "N": 1, "C": 1}

#: Operators that only rearrange numbers: what they do to rows of a weight is seen by running them.
_MOVES = (
    aten.reshape.default,
    aten.split_with_sizes.default,
    aten.slice.Tensor,
    aten.transpose.int,
    aten.permute.default,
    operator.getitem,
)
_NORMS = (einfold_ops.rms_norm.default, einfold_ops.layer_norm.default)


class LostHeadsError(Exception):
    """Why heads cannot be followed to the rows of a weight, in a sentence."""


@dataclass(frozen=True)
class HeadRows:
    """Where the heads of q, k or v come from."""

    linear: fx.Node
    rows_HD: Tensor
    """The row of the linear's weight that gives each number of each head."""
    path: Mapping[fx.Node, Any]
    """The calls from the linear to the heads, and of which rows each one's results are, as tensors."""
    direct: bool
    """Whether nothing but a rotary embedding touches the numbers on their way."""

    def read_by(self, attention: fx.Node) -> fx.Node | None:
        """A call beside this attention that reads a number of these heads, None where there is none."""
        own = set(self.rows_HD.flatten().tolist())
        for step, rows in self.path.items():
            for user in step.users:
                if user is attention or user in self.path:
                    continue
                move: Any = user.target
                part = move in (operator.getitem, aten.slice.Tensor)
                read = move(rows, *user.args[1:]) if part else self.rows_HD
                if not own.isdisjoint(read.flatten().tolist()):
                    return user
        return None


def head_rows(program: Program, node: fx.Node) -> HeadRows:
    """Follows heads [B, S, H, D] back to the linear that makes them, moving row numbers as the graph moves
    numbers. Raises LostHeadsError."""
    path, direct = [node], True
    while node.target is not einfold_ops.linear.default:
        if node.target in _NORMS:
            if node.meta["val"].dim() != 4:
                raise LostHeadsError("a norm runs over all heads at once")
            direct = False
        elif node.target is aten.mul.Tensor and not isinstance(node.args[1], fx.Node):
            direct = False
        elif node.target is not einfold_ops.rotary.default and node.target not in _MOVES:
            raise LostHeadsError(f"%{node.name} stands between projection and attention")
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
        path.append(node)
    found: Any = torch.arange(int(node.meta["val"].shape[-1])).expand(1, 1, -1)
    rows = {node: found}
    for step in reversed(path[:-1]):
        if step.target is aten.reshape.default:
            sizes = [program.shapes.evaluate(size, _ONE) for size in step.meta["val"].shape]
            found = found.reshape(sizes)
        elif step.target in _MOVES:
            move: Any = step.target
            found = move(found, *step.args[1:])
        rows[step] = found
    assert isinstance(found, Tensor)
    return HeadRows(node, found[0, 0], rows, direct)


def output_projection(attention: fx.Node) -> fx.Node:
    """The linear that reads all heads of what an attention gives, side by side. Raises LostHeadsError."""
    heads, size = attention.meta["val"].shape[-2:]
    step = attention
    while step.target is not einfold_ops.linear.default:
        if len(step.users) != 1 or step.target not in (attention.target, aten.reshape.default):
            raise LostHeadsError(f"%{step.name} stands between attention and its output projection")
        step = next(iter(step.users))
    if step.args[0].meta["val"].shape[-1] != heads * size:  # type: ignore[union-attr]
        raise LostHeadsError("the output projection does not read all heads at once")
    return step
