"""How the inputs of a product vary together."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...ir.program import Program
from .. import sites
from ..observer import OBSERVERS, Found, Observer
from ..sites import Site

#: Parts of the columns whose moments are computed together: what lies above them is known by then.
_PARTS = 8


@OBSERVERS.register
class InputMoments(Observer):
    """`moment` [M, M]: the mean of x xᵀ over the tokens, x the inputs of a linear, as a model has them whose
    weights are partly solved; `drift` [M, M]: the mean of (o - x) xᵀ, o the inputs of the original, where
    these are others. Of a weight W [N, M] that is given, with fewer rows than columns, `drifted` [N, M] is
    in its place, the mean of W (o - x) xᵀ: all that is asked of drift, by fewer products (in front of a down
    projection of 896 by 4,864 a third as many).

    A table that tokens are embedded by too is read in every direction, also in those that the head's inputs
    never take: it has no drift, and a moment that is at least the median channel's everywhere. (SmolLM2-135M,
    the table alone in 4 bits, blocks of 32: KL 0.085 rounded to nearest, 0.034 by GPTQ on these.)"""

    name = "input_moments"

    def sites(self, program: Program) -> list[Site]:
        return sites.weight_inputs(program)

    def see(self, site: Site, *values: Any) -> Found:
        x_TM: Tensor = values[0].flatten(0, -2)
        found = {"moment": _moment(x_TM)}
        if site.embeds:
            found["moment"].diagonal().add_(found["moment"].diagonal().median())
        elif len(values) > 1 and values[1] is not values[0]:
            apart_TM = values[1].flatten(0, -2) - x_TM
            weight_NM = values[2] if len(values) > 2 else None
            if weight_NM is not None and len(weight_NM) < weight_NM.shape[1]:
                label, apart_TM = "drifted", apart_TM @ weight_NM.to(x_TM.dtype).T
            else:
                label = "drift"
            found[label] = (apart_TM.T @ x_TM).div_(len(x_TM))
        return found


def _moment(x_TM: Tensor) -> Tensor:
    """The mean of x xᵀ over the tokens, [M, M], which is symmetric: little more than a half is computed."""
    width = x_TM.shape[1]
    found_MM = x_TM.new_empty(width, width)
    step = -(-width // _PARTS)
    for start in range(0, width, step):
        stop = min(start + step, width)
        part = (x_TM[:, start:].T @ x_TM[:, start:stop]).div_(len(x_TM))
        own = part[: stop - start]
        own.copy_(own.tril() + own.tril(-1).T)  # some libraries round the two halves unlike
        found_MM[start:, start:stop] = part
        found_MM[start:stop, stop:] = part[stop - start :].T
    return found_MM
