"""Structured weight formats go through what holds for every scheme, and do what each is there for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.quant.scheme import Scheme
from einfold.compiler.ir.quant.schemes.bitmod import BitMod
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.quant.schemes.planes import Planes
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.errors import IRError

from . import common

OWN: list[Scheme] = [
    Planes(),
    Planes(8, read=4),
    Planes(6, block=16),
    BitMod(),
    BitMod(3, block=32),
]

#: Exporting a scheme's meaning takes seconds: one linear of each kind, the whole program when asked for.
IN_ONNX: list[tuple[Scheme, str]] = [(Planes(8, read=4), "ort"), (BitMod(3), "portable")]
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
        scheme = BitMod(bits, block=16)
        blocks = torch.tensor([(table * 16)[:16] for table in scheme.tables])
        found = RoundToNearest().solve(blocks, scheme, {})
        assert found.error == 0.0
        assert found.pieces["special"].flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Planes(9),
        lambda: Planes(4, read=5),
        lambda: Planes(block=12),
        lambda: BitMod(2),
        lambda: BitMod(block=20),
    ],
)
def test_impossible_options(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(IRError):
        make()
