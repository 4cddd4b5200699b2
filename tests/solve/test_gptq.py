"""GPTQ: nearer in products than rounding to nearest, on moments of any kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from einfold.compiler.ir.quant.scheme import Scheme
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.quant.schemes.lowrank import LowRank
from einfold.compiler.solve.gptq import GPTQ
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.errors import CalibrationError

from ..quant.test_schemes import OWN
from . import common


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment_of(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Second moments of inputs that vary together."""
    x = randn(tokens, width, seed=seed) @ randn(width, width, seed=seed + 1)
    return x.T @ x / tokens


def off(weight: Tensor, moment: Tensor, scheme: Scheme, solver: GPTQ | RoundToNearest) -> float:
    """The mean square of the error of the products."""
    pieces = solver.solve(weight, scheme, {"moment": moment}).pieces
    apart = scheme.dequantize(pieces, weight.shape[-1]) - weight
    return float(((apart @ moment) * apart).sum())


@pytest.mark.parametrize(
    "scheme",
    [*(scheme for scheme in OWN if scheme.by_itself), LowRank(Grouped(3, 16), 4)],
    ids=str,
)
def test_what_holds_for_every_solver(scheme: Scheme) -> None:
    common.check_pieces(GPTQ(), scheme, {"moment": moment_of(80, 40)})
    common.check_graph(GPTQ(), scheme)


@given(
    st.sampled_from([Grouped(2, 16), Grouped(4, 32, False), Grouped(4, 64)]),
    st.integers(1, 70),
    st.integers(1, 100),
    st.integers(0, 9),
)
def test_products_are_nearer_than_rounded_to_nearest(
    scheme: Grouped, width: int, tokens: int, seed: int
) -> None:
    """Also where there are fewer tokens than channels, whose moments are singular."""
    weight, moment = randn(40, width, seed=seed), moment_of(tokens, width, seed)
    assert off(weight, moment, scheme, GPTQ()) <= 1.02 * off(
        weight, moment, scheme, RoundToNearest()
    )


def test_much_is_gained_where_inputs_vary_together() -> None:
    weight, moment = randn(64, 128), moment_of(400, 128)
    for scheme in (Grouped(4, 32, False), Grouped(2, 32)):
        found = off(weight, moment, scheme, GPTQ()) / off(weight, moment, scheme, RoundToNearest())
        assert found < 0.6


def test_independent_inputs_are_rounded_to_nearest() -> None:
    weight, scheme = randn(20, 64), Grouped(4, 32)
    moment = torch.diag(torch.rand(64) + 0.1)
    found = GPTQ(fit=False).solve(weight, scheme, {"moment": moment}).pieces
    nearest = RoundToNearest().solve(weight, scheme, {}).pieces
    assert all(torch.equal(found[name], nearest[name]) for name in nearest)


def test_the_target_makes_up_for_inputs_that_drifted() -> None:
    """With moments of many tokens, products are nearer to those of the original's inputs."""
    x, weight = randn(2000, 32), randn(24, 32, seed=4)
    own = x @ (torch.eye(32) + 0.3 * randn(32, 32, seed=6) / 6)
    found = {"moment": own.T @ own / 2000, "drift": (x - own).T @ own / 2000}
    scheme, want = Grouped(8, 32), x @ weight.T

    def away(solver: GPTQ) -> float:
        pieces = solver.solve(weight, scheme, found).pieces
        return float((own @ scheme.dequantize(pieces, 32).T - want).norm() / want.norm())

    none, half, whole = (away(GPTQ(drift=share)) for share in (0.0, 0.5, 1.0))
    assert whole < 0.1 * none and half < 0.6 * none


def test_channels_that_are_always_zero() -> None:
    moment = moment_of(50, 32)
    moment[3], moment[:, 3] = 0, 0
    for given_moment in (moment, torch.zeros(32, 32)):
        found = GPTQ().solve(randn(8, 32), Grouped(4, 16), {"moment": given_moment})
        assert bool(torch.isfinite(found.pieces["scales"]).all()) and found.error is not None
        assert found.error < 1.1


def test_moments_that_cannot_be_factorised_are_said() -> None:
    moment = torch.eye(16)
    moment[0, 1] = moment[1, 0] = float("nan")
    with pytest.raises(CalibrationError, match="cannot be factorised; a longer calibration text"):
        GPTQ().solve(randn(4, 16), Grouped(4, 16), {"moment": moment})
    more = torch.eye(16)
    more[0, 1] = more[1, 0] = 1.05  # no moment at all, but a little more damping makes it one
    assert GPTQ().solve(randn(4, 16), Grouped(4, 16), {"moment": more}).error is not None
