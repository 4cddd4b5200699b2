"""The trellis finds the nearest of its streams, and comes nearer to Gaussian weights than any scalar."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.quant import trellis
from einfold.compiler.ir.quant.hadamard import rotate, rotate_back
from einfold.compiler.ir.quant.schemes.planes import Planes
from einfold.compiler.ir.quant.schemes.trellis import Trellis

from .test_structured import error, gaussian

#: Squared error of the best scalar code of 2^b levels for a Gaussian (Max 1960), and the least of any code.
LLOYD_MAX = {2.0: 0.1175, 3.0: 0.03454, 4.0: 0.009497}


def streams_of(codes: Tensor, rate: float, memory: int) -> Tensor:
    packed = trellis.pack_codes(codes, rate)
    return trellis.unpack_values(packed, codes.shape[-1], rate, memory)


@pytest.mark.parametrize(("rate", "width"), [(1.0, 12), (1.5, 8), (2.25, 5)])
def test_a_search_finds_the_nearest_of_all_streams(rate: float, width: int) -> None:
    added = trellis.steps(width, rate)
    every = torch.cartesian_prod(*(torch.arange(1 << count) for count in added))
    values = streams_of(every, rate, 8)
    rows = gaussian(20, width)
    found = streams_of(trellis.search(rows, rate, 8), rate, 8)
    least = (rows[:, None] - values).square().sum(-1).amin(-1)
    torch.testing.assert_close((found - rows).square().sum(-1), least)


def test_windows_are_those_of_the_stream() -> None:
    codes = torch.tensor([[3, 0, 2, 1, 3, 3, 1]])
    bits = "00000000" + "".join(f"{int(code):02b}" for code in codes[0])
    book = trellis.book(8)
    wanted = [book[int(bits[at + 2 : at + 10], 2)] for at in range(0, 14, 2)]
    assert streams_of(codes, 2.0, 8).tolist() == [pytest.approx(wanted)]
    assert sorted(book)[128] == -sorted(book)[127] > 0


@pytest.mark.parametrize("bits", [2.0, 3.0, 4.0])
def test_it_is_nearer_to_gaussian_weights_than_any_scalar(bits: float) -> None:
    weight, scheme = gaussian(24), Trellis(bits)
    found = error(weight, scheme)
    assert scheme.nbytes((24, 576)) < Planes(int(bits)).nbytes((24, 576))
    assert 4**-bits < found < 0.65 * LLOYD_MAX[bits]
    assert found < error(weight, Planes(int(bits)))


def test_a_fraction_is_more_than_a_mixture() -> None:
    weight = gaussian(8)
    two, half, three = (error(weight, Trellis(bits, memory=8)) for bits in (2.0, 2.5, 3.0))
    assert three < half < 0.9 * (two + three) / 2


def test_long_rows_are_searched_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gaussian(8)
    whole = streams_of(trellis.search(rows, 2.0, 8), 2.0, 8)
    monkeypatch.setattr(trellis, "_STRETCH", 100)
    monkeypatch.setattr(trellis, "_AHEAD", 40)
    parts = streams_of(trellis.search(rows, 2.0, 8), 2.0, 8)
    assert (parts - rows).norm() < 1.001 * (whole - rows).norm()


def test_rotations_spread_what_stands_out() -> None:
    for width in (1, 8, 48, 576):
        rows = gaussian(3, width)
        turned = rotate(rows)
        torch.testing.assert_close(rotate_back(turned), rows)
        torch.testing.assert_close(turned.norm(dim=-1), rows.norm(dim=-1))
        matrix = rotate(torch.eye(width))
        torch.testing.assert_close(rows @ matrix, turned)
        # The rotation of one number has the same magnitude in all places of its set.
        alone = matrix[0].abs()
        assert int((alone > 0).sum()) == (width & -width)
    weight = gaussian(24)
    weight[:, ::50] *= 10
    assert error(weight, Trellis(memory=8)) < 1.3 * error(gaussian(24), Trellis(memory=8))
