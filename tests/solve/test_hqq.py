"""HQQ: nearer to the weight than rounding to nearest, by its own norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.quant.scheme import Scheme
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.quant.schemes.lowrank import LowRank
from einfold.compiler.ir.quant.schemes.plain import Half
from einfold.compiler.solve.hqq import HQQ
from einfold.compiler.solve.round_to_nearest import RoundToNearest

from ..quant.test_schemes import OWN
from . import common


def far(weight: Tensor, scheme: Scheme, solver: HQQ | RoundToNearest, norm: float) -> float:
    pieces = solver.solve(weight, scheme, {}).pieces
    apart = scheme.dequantize(pieces, weight.shape[-1]) - weight
    return float(apart.abs().pow(norm).sum())


@pytest.mark.parametrize(
    "scheme", [s for s in [*OWN, LowRank(Grouped(3, 16), 4)] if not HQQ().refuses(s)], ids=str
)
def test_what_holds_for_every_solver(scheme: Scheme) -> None:
    common.check_pieces(HQQ(), scheme, {})
    common.check_graph(HQQ(), scheme)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_it_is_nearer(bits: int, symmetric: bool) -> None:
    scheme = Grouped(bits, 32, symmetric)
    weight = torch.randn(50, 96, generator=torch.Generator().manual_seed(1))
    for norm in (0.7, 2.0):
        nearest = far(weight, scheme, RoundToNearest(), norm)
        assert far(weight, scheme, HQQ(norm=norm), norm) < 0.97 * nearest


def test_a_scheme_without_scales_is_refused() -> None:
    assert "half has none that a group may choose" in HQQ().refuses(Half())
