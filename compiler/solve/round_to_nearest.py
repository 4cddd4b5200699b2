"""Round to nearest: every weight takes the level that is nearest to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.quant.scheme import Scheme
from ..ir.types import DTYPES
from .solver import SOLVERS, Solved, Solver

#: Numbers that are rounded at a time: bounds the memory of intermediates at a few tens of megabytes.
_SLAB = 1 << 21


@SOLVERS.register
@dataclass(frozen=True)
class RoundToNearest(Solver):
    """Each group's levels follow its own range. Works on a few rows at a time, in float32.

    Source: the baseline of GPTQ (Frantar et al. 2022, section 4).
    """

    name = "round_to_nearest"

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Mapping[str, Tensor]) -> Solved:
        lead, width = weight.shape[:-1], weight.shape[-1]
        rows = weight.reshape(-1, width)
        pieces = {
            label: torch.empty(shape, dtype=DTYPES[kind])
            for label, (shape, kind) in scheme.pieces(tuple(weight.shape)).items()
        }
        flat = {label: piece.flatten(0, len(lead) - 1) for label, piece in pieces.items()}
        step = max(1, _SLAB // width)
        missed = total = 0.0
        for start in range(0, len(rows), step):
            values = rows[start : start + step].float()
            groups = scheme.groups(values)
            grid = scheme.grid(groups)
            packed = scheme.pack(scheme.nearest(groups, grid), grid)
            for label, piece in packed.items():
                flat[label][start : start + step] = piece
            if not scheme.nearly_exact:
                restored = scheme.dequantize(packed, width)
                missed += float((restored - values).square().sum(dtype=torch.float64))
                total += float(values.square().sum(dtype=torch.float64))
        if scheme.nearly_exact:
            return Solved(pieces)
        return Solved(pieces, math.sqrt(missed / total) if total else 0.0)
