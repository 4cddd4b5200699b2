"""AutoRound: codes and scales of a layer go where the sign of its gradient points."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import IRError
from ..ir.quant.schemes.grouped import Grouped
from .solver import SOLVERS, Begun, Layer, Solved, relative_error
from .tuner import Tuner

#: Parts on which a layer has to be better.
_JUDGES = 4

#: What of its distance from its code a number begins with.
_SHARE = 0.9


@SOLVERS.register
@dataclass(frozen=True)
class AutoRound(Tuner):
    """Begins with what the solver `start` gives. Then codes and scales of all linears of a layer are tuned
    together, in `steps` on `batch` parts of the text each, of about 1,024 tokens: a code, before it is
    rounded, goes by the sign of its gradient, in smaller and smaller steps that add up to `reach` levels, and
    a scale so too, up to the share `scale` of itself. Where what the layer makes of four parts is then no
    nearer to what the original makes of them, the layer stays as it was.

    Source: AutoRound (Cheng et al. 2023, algorithm 1). Different from it: it begins with solved codes, where
    the paper has the nearest (`start=round_to_nearest,steps=200,reach=0.5`); it moves scales, where the paper
    moves what of a group's range is covered; and every token counts alike, however large it is.
    """

    steps: int = 30
    batch: int = 2
    reach: float = 0.02
    scale: float = 0.05

    name = "autoround"
    tunes = "layers"

    def __post_init__(self) -> None:
        super().__post_init__()
        moves = 0 <= self.reach < math.inf and 0 <= self.scale < 1
        if self.steps < 1 or self.batch < 1 or not moves:
            raise IRError(
                "autoround takes 1 or more steps of 1 or more parts, codes that move 0 or more levels and "
                f"scales that move by a share below 1, not {self.steps}, {self.batch}, {self.reach:g} and "
                f"{self.scale:g}"
            )

    def tune(self, layer: Layer) -> dict[str, Solved]:
        latent = {name: _Latent(begun) for name, begun in layer.weights.items()}

        def weights() -> dict[str, Tensor]:
            return {name: each.weight() for name, each in latent.items()}

        places = drawn(layer.parts)
        judges = [next(places) for _ in range(min(_JUDGES, layer.parts))]
        before = layer.lost(weights(), judges)
        for step in range(self.steps):
            rate = 2 * (1 - step / self.steps) / (self.steps + 1)  # they add up to 1
            parts = [next(places) for _ in range(min(self.batch, layer.parts))]
            for name, slope in layer.slopes(weights(), parts).items():
                latent[name].move(slope, rate * self.reach, rate * self.scale)
        if layer.lost(weights(), judges) >= before:
            return {}
        return {name: each.solved() for name, each in latent.items()}


def drawn(count: int) -> Iterator[int]:
    """Numbers below `count` without end, each once in every round; the same ones in every run."""
    order, drawn = [*range(count)], random.Random(0)
    while True:
        drawn.shuffle(order)
        yield from order


class _Latent:
    """A weight whose codes are not rounded yet, and whose scales are not settled."""

    def __init__(self, begun: Begun) -> None:
        scheme = begun.scheme
        assert isinstance(scheme, Grouped)
        self._scheme, self._begun = scheme, begun
        self._width = begun.target.shape[-1]
        codes, grid = scheme.opened(begun.solved.pieces, self._width)
        self._zeros, self._scales = grid["zeros"], grid["scales"]
        wanted = scheme.groups(begun.target) / self._scales + self._zeros
        # A solved code need not be the nearest. No number stands where the first step would round it
        # otherwise: so many would go at once that it could not be made up for.
        self._codes = codes + _SHARE * torch.clamp(wanted - codes, -0.5, 0.5)

    def weight(self) -> Tensor:
        """[N, M], as the inputs as they are meet it."""
        codes, grid = self._rounded()
        weight = self._scheme.values(codes, grid).flatten(1)[:, : self._width]
        return self._begun.solved.met(weight)

    def move(self, slope: Tensor, codes: float, scales: float) -> None:
        """Goes against the slope of a weight, codes by so much, and scales by that share of them."""
        felt = self._scheme.groups(self._begun.solved.met(slope))
        rounded, grid = self._rounded()
        by_scale = (felt * (rounded - self._zeros)).sum(-1, keepdim=True)
        self._codes -= codes * torch.sign(felt * grid["scales"])
        self._scales = self._scales - scales * self._scales.abs() * torch.sign(by_scale)
        self._codes.clamp_(-0.49, (1 << self._scheme.bits) - 0.51)

    def solved(self) -> Solved:
        codes, grid = self._rounded()
        pieces = self._scheme.pack(codes, grid)
        error = relative_error(self._scheme.dequantize(pieces, self._width), self._begun.target)
        return replace(self._begun.solved, pieces=pieces, error=error)

    def _rounded(self) -> tuple[Tensor, dict[str, Tensor]]:
        grid = self._scheme.settle({"scales": self._scales, "zeros": self._zeros})
        return self._codes.round(), grid
