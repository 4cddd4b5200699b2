"""Expert routing: each token runs through the few experts that its router chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from .activation import gated_activation_reference
from .record import OPERATORS, Operator

#: What an arena that is planned from shapes calls: see below, where they are defined.
_routed = torch.ops.einfold_routed

#: Tokens, and products of different experts, of a step that runs in buffers whose sizes its shapes tell.
FEW, PRODUCTS = 64, 64

#: What an expert's call reads of a weight that is stacked along a leading axis: the part of one expert.
Pick = Callable[[Tensor], Tensor]


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


def part_of(of: Pick, stack: Tensor | None) -> Tensor | None:
    """The part of one expert of what may be absent, a bias or zero points."""
    return None if stack is None else of(stack)


def pick(tensor: Tensor | None, expert: int) -> Tensor | None:
    """The expert's slice of an optional stacked weight."""
    return part_of(lambda stack: stack[expert], tensor)


def in_order(index_P: Tensor) -> Tensor:
    """What sorts a few whole numbers and keeps equal ones as they stand, [P].

    Torch's own sort takes memory of its own; here the place of each is how many come before it.
    """
    place_P = torch.arange(len(index_P), device=index_P.device)
    key_P = index_P * len(index_P) + place_P
    rank_P = (key_P[:, None] - key_P).clamp(0, 1).sum(-1)
    return torch.zeros_like(place_P).scatter_(0, rank_P, place_P)


class Routed(Operator):
    """What the calls have in common that run tokens through experts; they all take these arguments."""

    x_TM: Tensor
    index_TJ: Tensor
    weight_TJ: Tensor
    kind: str
    alpha: float
    limit: float

    @property
    def sizes(self) -> tuple[int, int]:
        """How many experts there are, and the rows of gate and up together."""
        raise NotImplementedError

    def gate_up(self, of: Pick) -> tuple[Tensor, Tensor | None]:
        """The gate's rows and then the up projection's [2I, M] of one expert, and its bias."""
        raise NotImplementedError

    def down(self, of: Pick) -> tuple[Tensor, Tensor | None]:
        """The down projection [M, I] of one expert, and its bias."""
        raise NotImplementedError

    def run(self) -> Tensor:
        if self._known():
            return self._in_known_sizes()
        return route(self.x_TM, self.index_TJ, self.weight_TJ, self._mlp)

    def _mlp(self, expert: int, rows: Tensor) -> Tensor:
        weight, bias = self.gate_up(lambda stack: stack[expert])
        hidden = hidden_of(rows, weight, bias, self.kind, self.alpha, self.limit)
        weight, bias = self.down(lambda stack: stack[expert])
        return functional.linear(hidden, weight, bias)

    def _known(self) -> bool:
        """Whether tokens are few, so that all that is computed on the way may have a size that shapes tell.

        Of a prompt every choice would take room at once, where one expert after the other takes that of its
        own tokens. Torch derives nothing by what is written into a given tensor.
        """
        derived = torch.is_grad_enabled() and any(each.requires_grad for each in self._tensors())
        tokens, products = len(self.x_TM), min(self.index_TJ.numel(), self.sizes[0])
        return not derived and 0 < tokens <= FEW and products <= PRODUCTS

    def _tensors(self) -> list[Tensor]:
        given = [getattr(self, field.name) for field in fields(self)]
        flat = [
            each for one in given for each in (one if isinstance(one, (list, tuple)) else [one])
        ]
        return [each for each in flat if isinstance(each, Tensor)]

    def _in_known_sizes(self) -> Tensor:
        """Every choice of a token is a row, P in all, and the rows of one expert stand together."""
        order_P = in_order(self.index_TJ.flatten())
        experts_P = self.index_TJ.flatten().index_select(0, order_P)
        token_P = order_P // self.index_TJ.shape[1]
        rows_PM = self.x_TM.index_select(0, token_P)
        both_PN = self._products(rows_PM, experts_P, self.sizes[1], self.gate_up)
        gate, up = both_PN.chunk(2, dim=-1)
        hidden_PI = gated_activation_reference(gate, up, self.kind, self.alpha, self.limit)
        out_PM = self._products(hidden_PI, experts_P, self.x_TM.shape[1], self.down)
        weight_P = self.weight_TJ.flatten().index_select(0, order_P)
        return torch.zeros_like(self.x_TM).index_add_(0, token_P, out_PM * weight_P[:, None])

    def _products(
        self,
        x_PM: Tensor,
        experts_P: Tensor,
        width: int,
        weight: Callable[[Pick], tuple[Tensor, Tensor | None]],
    ) -> Tensor:
        """Each row times the weight of its expert, [P, width].

        On the meta device nobody knows which experts were chosen: there are as many products as there may be,
        and those of no rows do nothing.
        """
        most = min(len(experts_P), self.sizes[0])
        products = most if x_PM.is_meta else len(_runs(experts_P))
        out = x_PM.new_empty((len(x_PM), width))
        for at in range(products):
            of_expert, bias = weight(partial(_routed.part, experts=experts_P, at=at))
            out = _routed.product(out, x_PM, experts_P, at, of_expert, bias)
        return out


def _runs(experts_P: Tensor) -> list[tuple[int, int, int]]:
    """The experts among these, which are in order: each with its first row and that behind its last."""
    found, start = [], 0
    for expert, rows in groupby(experts_P.tolist()):
        end = start + len([*rows])
        found.append((expert, start, end))
        start = end
    return found


def _part(stack: Tensor, experts_P: Tensor, at: int) -> Tensor:
    runs = _runs(experts_P)
    return stack[runs[min(at, len(runs) - 1)][0]]


def _product(
    out_PN: Tensor,
    x_PM: Tensor,
    experts_P: Tensor,
    at: int,
    weight_NM: Tensor,
    bias_N: Tensor | None,
) -> Tensor:
    for _, start, end in _runs(experts_P)[at : at + 1]:
        rows, out = x_PM[start:end], out_PN[start:end]
        if bias_N is None:
            torch.mm(rows, weight_NM.T, out=out)
        else:
            torch.addmm(bias_N, rows, weight_NM.T, out=out)
    return out_PN


#: What an arena that is planned from shapes calls between torch's own operators: which expert it is, they
#: learn when they run. No graph text may call them.
_ROUTED = torch.library.Library("einfold_routed", "DEF")
_ROUTED.define("part(Tensor(a) stack, Tensor experts, int at) -> Tensor(a)")
_ROUTED.define(
    "product(Tensor(a!) out, Tensor x, Tensor experts, int at, Tensor weight, Tensor? bias) -> Tensor(a!)"
)
_ROUTED.impl("part", _part, "CompositeExplicitAutograd")
_ROUTED.impl("part", lambda stack, experts_P, at: stack[0], "Meta")
_ROUTED.impl("product", _product, "CompositeExplicitAutograd")
_ROUTED.impl("product", lambda out, *_: out, "Meta")


@OPERATORS.register
@dataclass(eq=False)
class Experts(Routed):
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

    @property
    def sizes(self) -> tuple[int, int]:
        return self.gate_up_ENM.shape[0], self.gate_up_ENM.shape[1]

    def gate_up(self, of: Pick) -> tuple[Tensor, Tensor | None]:
        return of(self.gate_up_ENM), part_of(of, self.gate_up_bias_EN)

    def down(self, of: Pick) -> tuple[Tensor, Tensor | None]:
        return of(self.down_EMI), part_of(of, self.down_bias_EM)

    def mlp(self, expert: int, rows: Tensor, gate_up_NM: Tensor, down_MI: Tensor) -> Tensor:
        """What an expert makes of its tokens, with these weights in the place of its own."""
        hidden = self.hidden(expert, rows, gate_up_NM)
        return functional.linear(hidden, down_MI, pick(self.down_bias_EM, expert))

    def hidden(self, expert: int, rows: Tensor, gate_up_NM: Tensor) -> Tensor:
        """What its down projection reads of them, with these weights."""
        bias = pick(self.gate_up_bias_EN, expert)
        return hidden_of(rows, gate_up_NM, bias, self.kind, self.alpha, self.limit)
