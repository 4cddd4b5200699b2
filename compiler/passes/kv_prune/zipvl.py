"""ZipVL: budgets by how many tokens of a layer take nearly all of its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....errors import RecipeError
from ...ir.kv.layout import LayerCache
from ...ir.program import Program
from ..base import Pass, PassResult, check_options
from ..methods import PRUNE
from .budgets import (
    Make,
    Sizes,
    alike,
    at_will,
    attention_by_layer,
    by_weights,
    fewest,
    give,
    open_layers,
    scoring,
)
from .heads import Head


@PRUNE.register
@dataclass(frozen=True)
class ZipVL(Pass):
    """More tokens in layers where it takes more of them to reach a share of the attention (He et al. 2024,
    section 4.1).

    Before: `cache 0.0 .. policy=full`, `cache 1.0 .. policy=full`
    After:  `cache 0.0 .. policy=voted(chosen=363,observe=32,..)`, `cache 1.0 .. policy=voted(chosen=85,..)`

    A layer's important tokens are the fewest whose attention, added up over its heads and the queries of the
    calibration text, is `threshold` of all. Budgets are in proportion to how many they are.

    Options: `tokens`, the mean budget of a head; `by`, the method that chooses tokens, with options of its
    own where it is given any (`snapkv:observe=16`); `threshold`, the share of the attention that important
    tokens take, tau in the paper; `slack`, tokens that may gather between moves; `read`, how many tokens of
    the calibration text are looked at.

    Measured on SmolLM2-135M-Instruct, recall behind 1,000 and 4,000 tokens: 0.05 and 0.00 by the defaults,
    against 0.70 and 0.65 with every token. The KL is 0.193, and 0.185 by `snapkv` alone with as many bytes:
    layers differ little, the defaults give them 202 to 310 tokens, and what differs is no gain here. On
    examples/tiny_llama it is 0.109 and 0.105.

    Differs from the paper: a layout has its sizes when it is compiled, so layers are compared on the
    calibration text, not on each prompt, by the attention of all of its queries; budgets are a base and
    eighths of the rest, and their mean is `tokens`. All of a prompt is attended to while it is read. Tokens
    that are not important leave; `--quant zipcache` stores such ones in fewer bits, as the paper's second
    half does.
    """

    tokens: int = 256
    by: str = "snapkv"
    threshold: float = 0.975
    slack: int = 64
    read: int = 1024

    name = "zipvl"
    requires = frozenset({"cache planned"})

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise RecipeError(
                "cache.prune: threshold is a share of the attention, more than 0 and less than 1, not "
                f"{self.threshold}"
            )
        if self.read < 16:
            raise RecipeError(
                f"cache.prune: layers are compared on 16 tokens or more, not {self.read}"
            )
        check_options("cache.prune", lambda: self.sizes(self.make(), 2 * self.tokens))

    def make(self) -> Make:
        """The policies by budget. Raises RecipeError for options that cannot be."""
        return scoring(self.by, self.slack, self.tokens)

    def sizes(self, make: Make, room: int) -> Sizes:
        """The budgets that there are, less than `room`. Raises IRError where there is nothing to share."""
        return Sizes.of(self.tokens, fewest(make, self.tokens), room)

    def run(self, program: Program) -> PassResult:
        result, make = PassResult(), self.make()
        layers = open_layers(program, make(self.tokens), result)
        weights = self._weights(program, layers, result)
        sizes = self.sizes(make, program.model.context - self.slack)
        budgets: dict[Head, int] = {}
        for part in alike(layers):
            budgets |= at_will(part, sizes) if weights is None else by_weights(part, weights, sizes)
        give(program, layers, budgets, make, result)
        return result

    def _weights(
        self, program: Program, layers: Sequence[LayerCache], result: PassResult
    ) -> dict[int, float] | None:
        """The important tokens of each layer, counted; None where nothing is known."""
        found = attention_by_layer(program, layers, self.read, result) if layers else None
        if found is None:
            return None
        return {layer: important(scores, self.threshold) for layer, scores in found.items()}


def important(scores_KT: Tensor, threshold: float) -> int:
    """The fewest tokens that take `threshold` of a layer's attention, of which each head's tokens take the
    shares `scores_KT`."""
    shares_T = scores_KT.double().mean(0).sort(descending=True).values
    return int(torch.searchsorted(shares_T.cumsum(0), threshold * shares_T.sum())) + 1
