"""rotate_values: the values of each head are turned by an orthogonal matrix, folded into the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...analysis.head_rows import HeadRows, LostHeadsError, head_rows, output_projection
from ...ir.program import Editor, Program, attention_nodes, call_arguments, remove_dead_nodes
from ...ir.quant.orthogonal import turned
from ..base import Pass, PassResult
from .turning import NotTurnedError, change_weight, check_alone, check_width

aten = torch.ops.aten


@dataclass(frozen=True)
class RotateValues(Pass):
    """Turns the values of each head, v -> v Q, and so what attention gives of them; nothing runs for it.

    Before: `%v = reshape(linear(%x, %w, %b), ..); %a = attention(%q, %k, %v, ..); %o = linear(%a, %u)`
    After:  the same calls; the rows of `%w` and the numbers of `%b` that make a head's values turned, and the
            columns of `%u` that read the head's sum of values

    Attention sums values, and a sum of turned values is the turned sum. All heads of a size are turned alike,
    so that heads of a group, and layers that read another one's cache, stay consistent. It stands in front of
    the methods of caches: what these measure and store are the turned values.

    Source: QuaRot (Ashkboos et al. 2024, section 4, stage 1c), R2 of SpinQuant (Liu et al. 2024). Different
    from QuaRot: heads are not mixed with one another as the model runs, so what the output projection reads
    is turned head by head.
    """

    name = "rotate_values"
    requires = frozenset({"linears raised"})

    def run(self, program: Program) -> PassResult:
        result, editor = PassResult(), Editor(program)
        for attention in attention_nodes(program):
            layer = f"layer {call_arguments(attention)['layer']}"
            try:
                values, output = _followed(program, attention)
            except (NotTurnedError, LostHeadsError) as reason:
                result.skipped(layer, f"values stay as they are: {reason}")
                continue
            heads, size = values.rows_HD.shape
            for name in ("weight_NM", "bias"):
                change_weight(editor, values.linear, name, _rows_turned(values.rows_HD))
            change_weight(editor, output, "weight_NM", _columns_turned(size))
            result.applied(layer, f"values of {heads} heads turned over {size} channels each")
        if not result.notes:
            result.skipped("graph", "no attention over a cache is in it")
        remove_dead_nodes(program)
        return result


def _followed(program: Program, attention: fx.Node) -> tuple[HeadRows, fx.Node]:
    """(the rows that make an attention's values, the linear that reads their sums); raises NotTurnedError or
    LostHeadsError where either cannot be turned for it alone."""
    values = head_rows(program, call_arguments(attention)["v_BSKD"])
    if not values.direct:
        raise NotTurnedError("they are normed or scaled behind their projection")
    if (other := values.read_by(attention)) is not None:
        raise NotTurnedError(f"%{other.name} reads them too")
    check_width(values.rows_HD.shape[1])
    output = output_projection(attention)
    check_alone(program, values.linear, "weight_NM", "bias")
    check_alone(program, output, "weight_NM")
    return values, output


def _rows_turned(rows_HD: Tensor) -> Callable[[Tensor], Tensor]:
    """Turns these rows of a weight [N, M] or a bias [N], head by head."""

    def change(whole: Tensor) -> Tensor:
        heads = whole[rows_HD].movedim(1, -1)
        found = whole.clone()
        found[rows_HD] = turned(heads).movedim(-1, 1)
        return found

    return change


def _columns_turned(size: int) -> Callable[[Tensor], Tensor]:
    """Turns the columns of a weight [M, HD], head by head."""
    return lambda weight: turned(weight.unflatten(1, (-1, size))).flatten(1)
