"""Expert routing: each token runs through the few experts that its router chose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .activation import gated_activation_reference


def route(
    x_TM: Tensor, index_TJ: Tensor, weight_TJ: Tensor, mlp: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """sum over slots j of weight[t, j] * mlp(index[t, j], x[t]); each expert sees its tokens only."""
    out_TM = torch.zeros_like(x_TM)
    for expert in index_TJ.unique().tolist():
        token, slot = torch.where(index_TJ == expert)
        out_TM.index_add_(0, token, mlp(expert, x_TM[token]) * weight_TJ[token, slot, None])
    return out_TM


def pick(tensor: Tensor | None, expert: int) -> Tensor | None:
    """The expert's slice of an optional stacked weight."""
    return None if tensor is None else tensor[expert]


@torch.library.custom_op("einfold::experts", mutates_args=())
def experts(
    x_TM: Tensor,
    index_TJ: Tensor,
    weight_TJ: Tensor,
    gate_up_ENM: Tensor,
    gate_up_bias_EN: Tensor | None,
    down_EMI: Tensor,
    down_bias_EM: Tensor | None,
    kind: str,
    alpha: float,
    limit: float,
) -> Tensor:
    """sum over slots j of weight[t, j] * MLP_{index[t, j]}(x[t]).

    `gate_up` holds the gate's I rows, then the up projection's I rows (N = 2I). `kind`, `alpha`,
    `limit` are those of `gated_activation`. Each expert runs on its own tokens only.
    """

    def mlp(expert: int, rows: Tensor) -> Tensor:
        gate_up = functional.linear(rows, gate_up_ENM[expert], pick(gate_up_bias_EN, expert))
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = gated_activation_reference(gate, up, kind, alpha, limit)
        return functional.linear(hidden, down_EMI[expert], pick(down_bias_EM, expert))

    return route(x_TM, index_TJ, weight_TJ, mlp)


@experts.register_fake
def _(x_TM: Tensor, *args: object) -> Tensor:
    return torch.empty_like(x_TM)
