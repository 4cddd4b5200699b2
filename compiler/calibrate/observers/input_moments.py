"""How the inputs of a product vary together."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...ir.program import Program
from .. import sites
from ..observer import OBSERVERS, Found, Observer
from ..sites import Site


@OBSERVERS.register
class InputMoments(Observer):
    """`moment` [M, M]: the mean of x xᵀ over the tokens, x the inputs of a linear, as a model has them whose
    weights are partly solved; `drift` [M, M]: the mean of (o - x) xᵀ, o the inputs of the original, where
    these are others.

    A table that tokens are embedded by too is read in every direction, also in those that the head's inputs
    never take: it has no drift, and a moment that is at least the median channel's everywhere. (SmolLM2-135M,
    the table alone in 4 bits, blocks of 32: KL 0.085 rounded to nearest, 0.034 by GPTQ on these.)"""

    name = "input_moments"

    def sites(self, program: Program) -> list[Site]:
        return sites.weight_inputs(program)

    def see(self, site: Site, *values: Any) -> Found:
        x_TM: Tensor = values[0].flatten(0, -2)
        found = {"moment": (x_TM.T @ x_TM).div_(len(x_TM))}
        if site.embeds:
            found["moment"].diagonal().add_(found["moment"].diagonal().median())
        elif len(values) > 1 and values[1] is not values[0]:
            apart_TM = values[1].flatten(0, -2) - x_TM
            found["drift"] = (apart_TM.T @ x_TM).div_(len(x_TM))
        return found
