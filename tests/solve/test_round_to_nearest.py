"""Rounding to nearest: bounds of its error, in slabs as in one piece."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from einfold.compiler.ir.quant.scheme import Scheme
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.solve import solver
from einfold.compiler.solve.round_to_nearest import RoundToNearest

from ..quant.test_schemes import OWN
from . import common


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([16, 32]),
    st.integers(1, 70),
    st.booleans(),
    st.integers(0, 5),
    st.floats(1e-6, 1e4),
)
def test_rounding_error_is_bounded_by_half_a_step(
    bits: int, block: int, width: int, symmetric: bool, seed: int, size: float
) -> None:
    weight, scheme = randn(3, width, seed=seed) * size, Grouped(bits, block, symmetric)
    pieces = RoundToNearest().solve(weight, scheme, {}).pieces
    restored = scheme.dequantize(pieces, width)
    step = pieces["scales"].abs().repeat_interleave(block, dim=-1)[:, :width]
    # A symmetric grid has one level less on one side: what lies there is cut by up to a whole step.
    bound = step * (1.0 if symmetric else 0.5) * 1.001 + 1e-6 * size
    if not symmetric:
        bound = bound + 0.5 * step  # the zero point is itself rounded to a level
    assert bool(((restored - weight).abs() <= bound).all())


def test_zero_weights_stay_zero() -> None:
    for symmetric in (True, False):
        scheme = Grouped(4, 32, symmetric)
        found = RoundToNearest().solve(torch.zeros(2, 32), scheme, {})
        assert bool((scheme.dequantize(found.pieces, 32) == 0).all())
        assert bool(torch.isfinite(found.pieces["scales"]).all())
        assert found.error == 0


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scheme = randn(3, 5, 40), Grouped(4, 16, symmetric=False)
    whole = RoundToNearest().solve(weight, scheme, {})
    monkeypatch.setattr(solver, "_SLAB", 100)
    cut = RoundToNearest().solve(weight, scheme, {})
    assert whole.pieces.keys() == cut.pieces.keys()
    for label, piece in whole.pieces.items():
        assert torch.equal(piece, cut.pieces[label])
    restored = scheme.dequantize(cut.pieces, 40)
    assert cut.error == pytest.approx(float((restored - weight).norm() / weight.norm()), rel=1e-5)


@pytest.mark.parametrize("scheme", OWN, ids=str)
def test_what_holds_for_every_solver(scheme: Scheme) -> None:
    common.check_pieces(RoundToNearest(), scheme, {})
    common.check_graph(RoundToNearest(), scheme)
    assert RoundToNearest().refuses(scheme) == ""
