"""Experts are solved one after the other, each on the tokens that are routed to it, and a little on all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibrate.observer import Found
from ..ir.ops.experts import Experts, route
from ..ir.quant.scheme import Scheme
from ..ir.types import DTYPES
from .solver import Solved

#: As how many tokens, for each channel of the inputs, all tokens of the text count beside an expert's own.
#: Of the toy model's feed-forward part, its tokens in 16 clusters by their inputs, one for each expert: the
#: error of results on other tokens (GPTQ, int3), as a share of rounding to nearest, is 0.72 on 600 tokens of
#: the expert alone, 0.64 with 0.25 to 1 here, and 0.67 with 4; on 32 tokens 0.91, 0.80 to 0.81, and 0.81.
_PRIOR = 0.5

#: What is found in the inputs [T, M] of a weight, as the stored model has them and as the original has.
Observe = Callable[[Tensor, Tensor], Found]

#: Solves the weight [N, M] of a name.
Solve = Callable[[str, Tensor, Found], Solved]


class Stack:
    """Weights [E, N, M] of a layer, and their pieces as they come to be solved; without a scheme they stay as
    they are."""

    def __init__(self, name: str, weight_ENM: Tensor, scheme: Scheme | None) -> None:
        self.name, self.weight_ENM = name, weight_ENM
        self._scheme = scheme
        pieces = {} if scheme is None else scheme.pieces(tuple(weight_ENM.shape))
        self._pieces = {
            label: torch.empty(shape, dtype=DTYPES[kind]) for label, (shape, kind) in pieces.items()
        }
        self._missed: list[float] = []

    def solve(self, expert: int, found: Found, solve: Solve) -> None:
        if self._scheme is None:
            return
        weight_NM = self.weight_ENM[expert]
        solved = solve(self.name, weight_NM, found)
        for label, piece in solved.pieces.items():
            self._pieces[label][expert] = piece
        if solved.error is not None:
            self._missed.append(solved.error * float(weight_NM.float().norm()))

    def at(self, expert: int) -> Tensor:
        """The weight of an expert, as it is stored."""
        if self._scheme is None:
            return self.weight_ENM[expert]
        pieces = self._scheme.chosen(self._pieces, expert)
        return self._scheme.dequantize(pieces, self.weight_ENM.shape[-1])

    def solved(self) -> Solved:
        """What all experts are stored as, once each was solved."""
        whole = float(self.weight_ENM.float().norm())
        error = math.hypot(*self._missed) / whole if whole else 0.0
        return Solved(self._pieces, error if self._missed else None)


@dataclass(frozen=True)
class _Inputs:
    """Inputs [T, M] of a weight in the stored model, and in the original: the same tensor where none is
    followed."""

    own: Tensor
    original: Tensor

    def of(self, tokens_T: Tensor) -> _Inputs:
        own = self.own[tokens_T]
        return _Inputs(own, own if self.original is self.own else self.original[tokens_T])

    def seen(self, observe: Observe) -> Found:
        return observe(self.own, self.original)


def solve_experts(
    original: Experts, own: Experts, gate_up: Stack, down: Stack, observe: Observe, solve: Solve
) -> None:
    """Solves a layer: of each expert the gate and up projection, then the down projection on what the stored
    ones give.

    `own` is the layer in the model whose weights were solved before, its tokens and their routes; `original`
    that in the original, the same where none is followed. One expert's statistics are held at a time, beside
    those of the layer's inputs.
    """
    inputs = _Inputs(own.x_TM, original.x_TM)
    alike = inputs.seen(observe)
    for expert in range(len(gate_up.weight_ENM)):
        tokens_T = (own.index_TJ == expert).any(1)
        gate_up.solve(expert, _mixed(inputs, tokens_T, alike, observe), solve)
        hidden_TI = original.hidden(expert, original.x_TM, gate_up.weight_ENM[expert])
        reads = _Inputs(hidden_TI, hidden_TI)
        if own is not original:
            reads = _Inputs(own.hidden(expert, own.x_TM, gate_up.at(expert)), hidden_TI)
        down.solve(expert, _mixed(reads, tokens_T, reads.seen(observe), observe), solve)


def _mixed(inputs: _Inputs, tokens_T: Tensor, alike: Found, observe: Observe) -> Found:
    """What is found in some tokens, gone over to what is found in all of them as the former get few."""
    count = int(tokens_T.sum())
    if not count:
        return alike
    found = inputs.of(tokens_T).seen(observe)
    share = count / (count + _PRIOR * inputs.own.shape[1])
    return {name: torch.lerp(alike[name], each, share) for name, each in found.items()}


def halves(layer: Experts) -> tuple[Experts, Experts]:
    """The layer for the first half of its tokens, and for the second."""
    parts = zip(
        *(part.chunk(2) for part in (layer.x_TM, layer.index_TJ, layer.weight_TJ)), strict=True
    )
    one, two = (replace(layer, x_TM=x, index_TJ=i, weight_TJ=w) for x, i, w in parts)
    return one, two


def joined(layers: Sequence[Experts]) -> Experts:
    """One layer for the tokens of several, which have the same weights."""
    if len(layers) == 1:
        return layers[0]
    x, index, weight = (
        torch.cat([getattr(layer, part) for layer in layers])
        for part in ("x_TM", "index_TJ", "weight_TJ")
    )
    return replace(layers[0], x_TM=x, index_TJ=index, weight_TJ=weight)


def run_stored(layer: Experts, gate_up: Stack, down: Stack) -> Tensor:
    """What the layer gives with the weights that are stored."""

    def mlp(expert: int, rows: Tensor) -> Tensor:
        return layer.mlp(expert, rows, gate_up.at(expert), down.at(expert))

    return route(layer.x_TM, layer.index_TJ, layer.weight_TJ, mlp)
