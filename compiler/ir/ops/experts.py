"""Expert routing: each token runs through the few experts that its router chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .activation import gated_activation_reference
from .record import OPERATORS, Operator


def route(
    x_TM: Tensor, index_TJ: Tensor, weight_TJ: Tensor, mlp: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """sum over slots j of weight[t, j] * mlp(index[t, j], x[t]); each expert sees its tokens only."""
    out_TM = torch.zeros_like(x_TM)
    for expert in index_TJ.unique().tolist():
        token, slot = torch.where(index_TJ == expert)
        out_TM.index_add_(0, token, mlp(expert, x_TM[token]) * weight_TJ[token, slot, None])
    return out_TM


def hidden_of(
    rows_TM: Tensor,
    gate_up_NM: Tensor,
    bias_N: Tensor | None,
    kind: str,
    alpha: float,
    limit: float,
) -> Tensor:
    """What the down projection of one expert reads of its tokens, [T, I]."""
    gate, up = functional.linear(rows_TM, gate_up_NM, bias_N).chunk(2, dim=-1)
    return gated_activation_reference(gate, up, kind, alpha, limit)


def pick(tensor: Tensor | None, expert: int) -> Tensor | None:
    """The expert's slice of an optional stacked weight."""
    return None if tensor is None else tensor[expert]


@OPERATORS.register
@dataclass(eq=False)
class Experts(Operator):
    """sum over slots j of weight[t, j] * MLP_{index[t, j]}(x[t]).

    `gate_up` holds the gate's I rows, then the up projection's I rows (N = 2I). `kind`, `alpha`,
    `limit` are those of `gated_activation_reference`. Each expert runs on its own tokens only.
    """

    name = "experts"

    x_TM: Tensor
    index_TJ: Tensor
    weight_TJ: Tensor
    gate_up_ENM: Tensor
    gate_up_bias_EN: Tensor | None
    down_EMI: Tensor
    down_bias_EM: Tensor | None
    kind: str
    alpha: float
    limit: float

    def run(self) -> Tensor:
        return route(self.x_TM, self.index_TJ, self.weight_TJ, self._mlp)

    def _mlp(self, expert: int, rows: Tensor) -> Tensor:
        return self.mlp(expert, rows, self.gate_up_ENM[expert], self.down_EMI[expert])

    def mlp(self, expert: int, rows: Tensor, gate_up_NM: Tensor, down_MI: Tensor) -> Tensor:
        """What an expert makes of its tokens, with these weights in the place of its own."""
        hidden = self.hidden(expert, rows, gate_up_NM)
        return functional.linear(hidden, down_MI, pick(self.down_bias_EM, expert))

    def hidden(self, expert: int, rows: Tensor, gate_up_NM: Tensor) -> Tensor:
        """What its down projection reads of them, with these weights."""
        bias = pick(self.gate_up_bias_EN, expert)
        return hidden_of(rows, gate_up_NM, bias, self.kind, self.alpha, self.limit)
