"""decoupleQ: nearer in products than GPTQ, with codes that are the best beside the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.quant.scheme import Scheme
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.quant.schemes.lowrank import LowRank
from einfold.compiler.ir.quant.schemes.olive import Olive
from einfold.compiler.solve.decoupleq import DecoupleQ, Product
from einfold.compiler.solve.gptq import GPTQ
from einfold.compiler.solve.moments import damped

from ..quant.test_schemes import OWN
from . import common
from .test_gptq import moment_of, randn


def lost(weight: Tensor, moment: Tensor, scheme: Scheme, solver: GPTQ) -> Tensor:
    """What each row loses in products, the moments damped as the solver has them."""
    pieces = solver.solve(weight, scheme, {"moment": moment}).pieces
    apart = scheme.dequantize(pieces, weight.shape[-1]) - weight
    return ((apart @ damped(moment, solver.damping)) * apart).sum(-1)


@pytest.mark.parametrize(
    "scheme", [s for s in [*OWN, LowRank(Grouped(3, 16), 4)] if not DecoupleQ().refuses(s)], ids=str
)
def test_what_holds_for_every_solver(scheme: Scheme) -> None:
    moment = moment_of(80, 40)
    common.check_pieces(DecoupleQ(), scheme, {"moment": moment})
    common.check_graph(DecoupleQ(), scheme)
    if scheme.coded is scheme:
        weight = randn(12, 40, seed=8)
        found, begun = (lost(weight, moment, scheme, s) for s in (DecoupleQ(), GPTQ()))
        assert bool((found <= begun * (1 + 1e-4)).all())


@pytest.mark.parametrize("width", [64, 150])
@pytest.mark.parametrize("bits", [2, 3])
def test_it_is_nearer_than_gptq(bits: int, width: int) -> None:
    """Also over more columns than are worked on at a time, and where the last group is not full."""
    scheme, weight = Grouped(bits, 32, False), randn(40, width)
    moment = moment_of(2 * width, width)
    found, begun = (float(lost(weight, moment, scheme, s).sum()) for s in (DecoupleQ(), GPTQ()))
    assert found < 0.93 * begun


def test_no_code_alone_could_be_better() -> None:
    """After enough turns."""
    scheme, weight, moment = Grouped(3, 16, False), randn(6, 32), moment_of(60, 32)
    solver = DecoupleQ(rounds=30)
    best = lost(weight, moment, scheme, solver)
    pieces = solver.solve(weight, scheme, {"moment": moment}).pieces
    stored = scheme.dequantize(pieces, 32)
    steps = pieces["scales"].repeat_interleave(16, dim=1)
    wide = damped(moment, solver.damping)
    for column in range(32):
        for sign in (1, -1):
            moved = stored.clone()
            moved[:, column] += sign * steps[:, column]
            # A code at an end of the levels could not move so.
            within = (moved.amax(1) <= stored.amax(1)) & (moved.amin(1) >= stored.amin(1))
            apart = moved - weight
            other = ((apart @ wide) * apart).sum(-1)
            assert bool((other[within] >= best[within] * (1 - 1e-4)).all())


def test_scales_that_fit_codes_are_found() -> None:
    """Those that a weight was made with, from others; a row that they cannot better keeps its own."""
    scheme, moment = Grouped(3, 16), damped(moment_of(200, 40), 0.01)
    codes = torch.randint(0, 8, (5, 3, 16), generator=torch.Generator().manual_seed(1)).float()
    codes[:, 2, 8:] = 4  # fill up the last group
    wanted = torch.rand(5, 3, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    wanted[0] = 1.0
    zeros = torch.full_like(wanted, 4)
    groups = scheme.values(codes, {"scales": wanted, "zeros": zeros})
    product = Product(moment, torch.arange(40), scheme)
    grid = {"scales": torch.ones(5, 3, 1), "zeros": zeros}
    felt = product.felt(groups, scheme.values(codes, grid))
    found, felt = product.scaled(groups, codes, grid, felt)
    torch.testing.assert_close(felt, product.felt(groups, scheme.values(codes, found)))
    torch.testing.assert_close(found["scales"], wanted, rtol=0.02, atol=0.02)
    assert torch.equal(found["scales"][0], wanted[0])


def test_what_is_felt_is_handed_on() -> None:
    """As codes change, what is felt of them follows."""
    scheme, moment = Grouped(3, 16), damped(moment_of(200, 40), 0.01)
    groups = scheme.groups(torch.randn(5, 40, generator=torch.Generator().manual_seed(1)))
    grid = scheme.settle(scheme.grid(groups))
    codes = scheme.nearest(groups, grid)
    product = Product(moment, torch.arange(40).flip(0), scheme)
    before = product.felt(groups, scheme.values(codes, grid))
    found, felt = product.coded(groups, codes, grid, before)
    assert not torch.equal(found, codes)
    torch.testing.assert_close(
        felt, product.felt(groups, scheme.values(found, grid)), rtol=1e-4, atol=1e-4
    )


def test_groups_that_are_coded_at_once_are_refused() -> None:
    assert "decoupleq moves the scales of groups, and olive" in DecoupleQ().refuses(Olive())
