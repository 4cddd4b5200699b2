"""Distillation: scales of all weights go where the whole model comes nearer to the original."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from ...errors import CalibrationError, IRError
from ..ir.quant.schemes.grouped import Grouped
from .autoround import drawn
from .solver import SOLVERS, Solved, Stored, Whole
from .tuner import Tuner

#: Of so many parts of the text one is kept to judge by.
_JUDGED = 8

#: Steps in which the rate grows to what it is at most.
_WARM = 8

#: Adam (Kingma and Ba 2014): what of the mean slope, and of the mean square, stays from step to step.
_MEAN, _SQUARE = 0.9, 0.95


@SOLVERS.register
@dataclass(frozen=True)
class Distill(Tuner):
    """Begins with what the solver `start` gives. Then the scales of all weights are tuned together, with the
    codes as they are, so that the probabilities of the next token come nearer to the original's: by Adam, in
    `steps` on one part of the text each, of about 1,024 tokens, by up to the share `rate` of a scale. An
    eighth of the text is not learned from. Where the model is no nearer on it then, weights stay as they
    were.

    Source: what mlx-lm calls distilled weight quantization (dwq), and the second phase of EfficientQAT (Chen
    et al. 2024, section 3.3). Different from them: codes were solved before; a step is a share of a scale;
    zero points stay; and layers are derived one by one, so that one is held in float32 at a time.
    """

    steps: int = 96
    rate: float = 0.002

    name = "distill"
    tunes = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not 0 < self.rate < 1:
            raise IRError(
                "distill takes 1 or more steps and a rate that is a share between 0 and 1, not "
                f"{self.steps} and {self.rate:g}"
            )

    def distill(self, model: Whole) -> dict[str, Solved]:
        if model.parts < 2:
            raise CalibrationError(
                "distill learns from one part of the calibration text and is judged by another, and the text "
                "is one part; give more tokens (calibration.tokens = 2048 at least)"
            )
        moved = {name: _Moved(stored) for name, stored in model.weights.items()}

        def weight(name: str) -> Tensor:
            return moved[name].weight()

        places = [*islice(drawn(model.parts), model.parts)]
        count = math.ceil(model.parts / _JUDGED)
        judges, read = places[:count], places[count:]
        kept = model.kept()
        done = int(kept["done"]) if kept else 0
        before = float(kept["before"]) if kept else model.lost(weight, judges)
        if not math.isfinite(before):
            raise CalibrationError(
                "the model's logits are not finite on the calibration text: its weights are damaged, or "
                "overflow in float32"
            )
        for name, each in moved.items():
            each.go_on(kept, name)

        def state() -> dict[str, Tensor]:
            found = {
                "done": torch.tensor(done),
                "before": torch.tensor(before, dtype=torch.float64),
            }
            return found | {k: t for name, each in moved.items() for k, t in each.state(name)}

        for part in islice(drawn(len(read)), done, self.steps):
            for name, slope in model.slopes(weight, read[part]):
                moved[name].learn(slope)
            share = min(1.0, (done + 1) / _WARM) * (1 + math.cos(math.pi * done / self.steps)) / 2
            done += 1
            for each in moved.values():
                each.move(self.rate * share, done)
            model.keep(state, done, self.steps - done)
        if not model.lost(weight, judges) < before:  # nor where it is no number
            return {}
        return {name: each.solved() for name, each in moved.items()}


class _Moved:
    """A weight whose scales are not settled yet, and Adam's means of their slopes."""

    def __init__(self, stored: Stored) -> None:
        assert isinstance(stored.scheme, Grouped)
        self._scheme, self._stored = stored.scheme, stored
        _, grid = self._opened()
        self._scales = grid["scales"]
        self._mean, self._square = torch.zeros_like(self._scales), torch.zeros_like(self._scales)
        self._slope = torch.zeros_like(self._scales)

    def state(self, name: str) -> list[tuple[str, Tensor]]:
        return [
            (f"{name}.scales", self._scales),
            (f"{name}.mean", self._mean),
            (f"{name}.square", self._square),
        ]

    def go_on(self, kept: Mapping[str, Tensor], name: str) -> None:
        """From what `state` told of it, where that was kept."""
        if kept:
            self._scales, self._mean, self._square = (kept[key] for key, _ in self.state(name))

    def weight(self) -> Tensor:
        """[N, M], as the inputs as they are meet it."""
        codes, grid = self._settled()
        weight = self._scheme.values(codes, grid).flatten(1)[:, : self._stored.width]
        return self._stored.solved.met(weight)

    def learn(self, slope: Tensor) -> None:
        """Adds a slope by the weight [N, M], as one by the logarithms of the scales."""
        codes, grid = self._settled()
        felt = self._scheme.groups(self._stored.solved.met(slope))
        self._slope += (felt * self._scheme.values(codes, grid)).sum(-1, keepdim=True)

    def move(self, rate: float, step: int) -> None:
        """Takes the step of that number, from 1 on."""
        self._mean = torch.lerp(self._slope, self._mean, _MEAN)
        self._square = torch.lerp(self._slope.square(), self._square, _SQUARE)
        self._slope.zero_()
        size = (self._square / (1 - _SQUARE**step)).sqrt()
        by = self._mean / (1 - _MEAN**step) / size
        by = torch.where(size > 0, by, 0.0).clamp(-1, 1)  # squares of small slopes are lost
        self._scales = self._scales * torch.exp(-rate * by)

    def solved(self) -> Solved:
        return replace(self._stored.solved, pieces=self._scheme.pack(*self._settled()), error=None)

    def _opened(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self._scheme.opened(self._stored.solved.pieces, self._stored.width)

    def _settled(self) -> tuple[Tensor, dict[str, Tensor]]:
        codes, grid = self._opened()
        return codes, self._scheme.settle({**grid, "scales": self._scales})
