"""Structured weight formats go through what holds for every scheme, and do what each is there for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.quant.scheme import Scheme
from einfold.compiler.ir.quant.schemes.bitmod import BitMod
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.quant.schemes.lowrank import LowRank
from einfold.compiler.ir.quant.schemes.olive import Olive
from einfold.compiler.ir.quant.schemes.planes import Planes
from einfold.compiler.ir.quant.schemes.spqr import SpQR
from einfold.compiler.ir.quant.schemes.trellis import Trellis
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.errors import IRError

from . import common

OWN: list[Scheme] = [
    Planes(),
    Planes(8, read=4),
    Planes(6, block=16),
    BitMod(),
    BitMod(3, group=32),
    Olive(),
    Olive(group=16),
    SpQR(),
    SpQR(4, outliers=0.0),
    Trellis(),
    Trellis(2.5, memory=8),
    LowRank(),
    LowRank(Planes(2), 4),
]

#: Exporting a scheme's meaning takes seconds: a linear in those that take the most of the exporter. All of
#: them, with a table and its head, when asked for.
IN_ONNX: list[tuple[Scheme, str]] = [
    (SpQR(), "ort"),
    (Trellis(2.5, memory=8), "portable"),
    (LowRank(Grouped(4, 32), 4), "ort"),
]
ONE_LINEAR = """
    weight @u.weight : f32[24, 40]
    input %x "x" : f32[N, 40]
    read %u "u.weight" : f32[24, 40]
    call %y = einfold.linear(%x, %u, none) : f32[N, 24]
    output "y" = %y
"""


@pytest.mark.parametrize("scheme", OWN, ids=str)
def test_text_bytes_and_graph(scheme: Scheme) -> None:
    common.check_text(scheme)
    common.check_bytes(scheme)
    common.check_graph(scheme)


@pytest.mark.parametrize(("scheme", "flavour"), IN_ONNX, ids=str)
def test_onnx(scheme: Scheme, flavour: str, tmp_path: Path) -> None:
    inputs = {"x": gaussian(5, 40)}
    assert common.check_onnx(scheme, flavour, tmp_path, ONE_LINEAR, inputs) == ""


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["ort", "portable"])
@pytest.mark.parametrize("scheme", OWN, ids=str)
def test_onnx_of_a_table_and_its_head(scheme: Scheme, flavour: str, tmp_path: Path) -> None:
    assert common.check_onnx(scheme, flavour, tmp_path) == ""


def gaussian(rows: int = 64, width: int = 576) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3))


def error(weight: Tensor, scheme: Scheme) -> float:
    """|w - restored|² / |w|²."""
    found = RoundToNearest().solve(weight, scheme, {}).error
    assert found is not None
    return found**2


def test_the_first_planes_are_the_weight_rounded_at_fewer_bits() -> None:
    weight = gaussian()
    stored = RoundToNearest().solve(weight, Planes(), {}).pieces
    for read in (4, 2):
        fewer = Planes().at(read)
        kept = fewer.kept(stored)
        assert sum(piece.nbytes for piece in kept.values()) == fewer.nbytes((64, 576))
        direct = RoundToNearest().solve(weight, Planes(read), {}).pieces
        assert all(torch.equal(kept[name], piece) for name, piece in direct.items())
        assert torch.equal(fewer.dequantize(kept, 576), Planes(read).dequantize(direct, 576))
        assert error(weight, fewer) < 1.12 * error(weight, Grouped(read))


def test_blocks_choose_the_level_that_fits_them() -> None:
    weight = gaussian()
    assert error(weight, BitMod(4, 128)) < 0.97 * error(weight, Grouped(4, 128, False))
    assert error(weight, BitMod(4, 32)) < 0.97 * error(weight, Grouped(4, 32))
    # Blocks on the levels of each of the four kinds are met exactly.
    for bits in (3, 4):
        scheme = BitMod(bits, group=16)
        blocks = torch.tensor([(table * 16)[:16] for table in scheme.tables])
        found = RoundToNearest().solve(blocks, scheme, {})
        assert found.error == 0.0
        assert found.pieces["special"].flatten().tolist() == [0, 1, 2, 3]


def with_outliers(share: float, size: float) -> Tensor:
    """Gaussian weights of which a share is as many times as large."""
    weight = gaussian()
    chosen = torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) < share
    return torch.where(chosen, size * weight, weight)


def test_pairs_keep_outliers_and_the_scale_of_the_others() -> None:
    weight = with_outliers(0.01, 10)
    for block in (32, 128):
        assert Olive(block).nbytes((64, 576)) < Grouped(4, block).nbytes((64, 576))
        assert error(weight, Olive(block)) < 0.5 * error(weight, Grouped(4, block))
    assert error(gaussian(), Olive()) < 1.1 * error(gaussian(), Grouped(4, 128))


def test_each_pair_takes_the_cheapest_of_all_pairs_of_codes() -> None:
    scheme, unit = Olive(group=2), {"scales": torch.ones(1, 1, 1)}
    every = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    # Two victims stand for nothing that is written.
    every = every[(every != 8).any(-1)]
    levels = scheme.values(every[None], unit)[0]
    weights = 12 * torch.randn(200, 2, generator=torch.Generator().manual_seed(5))
    found = scheme.values(scheme.nearest(weights[None], unit), unit)[0]
    least = (weights[:, None] - levels).norm(dim=-1).amin(-1)
    torch.testing.assert_close((found - weights).norm(dim=-1), least)


def test_a_few_floats_and_small_blocks_keep_what_plain_blocks_lose() -> None:
    weight, shape = with_outliers(0.01, 10), (64, 576)
    plain = [Planes(3, block=16), BitMod(3, group=16), Grouped(4, 128)]
    for other in plain:
        assert SpQR().nbytes(shape) < 1.05 * other.nbytes(shape)
        assert error(weight, SpQR()) < 0.5 * error(weight, other)
    assert error(gaussian(), SpQR()) < 0.9 * error(gaussian(), SpQR(outliers=0.0))


def test_outliers_are_a_fixed_count_of_a_row_and_exact_in_float16() -> None:
    weight = 0.01 * gaussian(2, 40_000)
    weight[0, 39_999], weight[1, 5] = 7.0, -3.0
    scheme = SpQR(outliers=1e-9)
    pieces = RoundToNearest().solve(weight, scheme, {}).pieces
    assert pieces["index"].tolist() == [[39_999 - 65_536], [5]]
    back = scheme.dequantize(pieces, 40_000)
    assert (back[0, 39_999], back[1, 5]) == (7.0, -3.0)
    with pytest.raises(IRError, match="a row has 65537"):
        scheme.pieces((2, 65_537))


def test_a_second_level_follows_what_a_solver_makes_of_the_first() -> None:
    scheme = SpQR()
    groups = scheme.groups(gaussian())
    grid = scheme.grid(groups)
    wider = scheme.settle(grid | {"scales": grid["scales"] * 3})
    torch.testing.assert_close(wider["scales"], grid["scales"] * 3, rtol=0.3, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Planes(9),
        lambda: Planes(4, read=5),
        lambda: Planes(block=12),
        lambda: BitMod(2),
        lambda: BitMod(group=20),
        lambda: Olive(group=7),
        lambda: SpQR(1),
        lambda: SpQR(second=12),
        lambda: SpQR(outliers=0.6),
        lambda: Trellis(0.5),
        lambda: Trellis(2.1),
        lambda: Trellis(memory=17),
    ],
)
def test_impossible_options(make: Callable[[], Scheme]) -> None:
    with pytest.raises(IRError):
        make()
