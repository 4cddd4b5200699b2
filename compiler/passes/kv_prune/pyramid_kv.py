"""PyramidKV: budgets of tokens that fall with depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ....errors import RecipeError
from ...ir.kv.layout import LayerCache
from ...ir.program import Program
from ..base import Pass, PassResult, check_options
from ..methods import PRUNE
from .budgets import Make, fewest, give, open_layers, scoring
from .heads import heads_of


@PRUNE.register
@dataclass(frozen=True)
class PyramidKV(Pass):
    """More tokens in early layers than in deep ones (Cai et al. 2024, section 3.2).

    Before: `cache 0.0 .. policy=full`, `cache 1.0 .. policy=full`
    After:  `cache 0.0 .. policy=voted(chosen=473,observe=32,..)`, `cache 1.0 .. policy=voted(chosen=5,..)`

    Budgets are an arithmetic sequence over the layers, whose mean is `tokens` and whose last one is `tokens`
    over `steepness`.

    Options: `tokens`; `by`, the method that chooses tokens, with options of its own where it is given any
    (`snapkv:observe=16`); `steepness`, beta in the paper; `sizes`, how many budgets there are, so that many
    layers move their tokens at the same time; `slack`, tokens that may gather between moves.

    Measured on SmolLM2-135M-Instruct, recall behind 1,000 and 4,000 tokens: 0.03 and 0.05 by the defaults,
    against 0.70 and 0.65 with every token. Depth does not tell which heads recall needs.

    Differs from the paper: neighbouring layers have the same budget, for `sizes` of them; the newest tokens
    that `by` keeps are a part of the budget. A first budget that the context has no room for is lowered, and
    the last one raised by as much.
    """

    tokens: int = 256
    by: str = "snapkv"
    steepness: float = 20.0
    sizes: int = 8
    slack: int = 64

    name = "pyramid_kv"
    requires = frozenset({"cache planned"})

    def __post_init__(self) -> None:
        if not self.steepness >= 1 or self.sizes < 1:
            raise RecipeError(
                "cache.prune: steepness is 1 or more and there are 1 or more sizes, not "
                f"{self.steepness} and {self.sizes}"
            )
        check_options("cache.prune", self.make)

    def make(self) -> Make:
        """The policies by budget. Raises RecipeError for options that cannot be."""
        return scoring(self.by, self.slack, self.tokens)

    def run(self, program: Program) -> PassResult:
        result, make = PassResult(), self.make()
        layers = open_layers(program, make(self.tokens), result)
        room = program.model.context - self.slack
        budgets = self.budgets(len(layers), fewest(make, self.tokens), room)
        give(program, layers, self._by_head(layers, budgets), make, result)
        return result

    def budgets(self, layers: int, least: int, room: int) -> list[int]:
        """The budget of each layer, `least` at least and less than `room`."""
        if not layers:
            return []
        last = max(self.tokens / self.steepness, least, 2 * self.tokens - room + 1)
        last = min(last, self.tokens)
        sizes = min(self.sizes, layers)
        step = 2 * (self.tokens - last) / max(1, sizes - 1)
        by_size = [round(2 * self.tokens - last - step * place) for place in range(sizes)]
        if sizes == 1:
            by_size = [self.tokens]
        return [by_size[layer * sizes // layers] for layer in range(layers)]

    def _by_head(
        self, layers: Sequence[LayerCache], budgets: Sequence[int]
    ) -> dict[tuple[int, int], int]:
        by_layer = {x.layer: tokens for x, tokens in zip(layers, budgets, strict=True)}
        return {head: by_layer[head[0]] for head in heads_of(layers)}
