"""Low-rank corrections: the best of their rank, two products in a graph, a scheme within a scheme."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.quant.low_rank import factors
from einfold.compiler.ir.quant.scheme import read_scheme
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.quant.schemes.lowrank import LowRank
from einfold.compiler.ir.quant.schemes.plain import Half
from einfold.compiler.ir.quant.schemes.planes import Planes
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.solve.low_rank import correction
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.errors import IRError

from ..programs import calls, program
from . import common
from .test_structured import error, gaussian


def inputs(count: int, width: int) -> Tensor:
    """Inputs whose channels differ in size and go together."""
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    sizes = torch.logspace(-1, 1, width)
    return (torch.randn(count, width, generator=generator) @ mix) * sizes


def test_without_inputs_it_is_the_singular_value_decomposition() -> None:
    residual = gaussian(30, 20)
    left, right = factors(residual, 5)
    u, s, v = torch.linalg.svd(residual)
    torch.testing.assert_close(left @ right, u[:, :5] * s[:5] @ v[:5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


@pytest.mark.parametrize("count", [400, 8])  # 8 inputs span 8 of 20 directions
def test_with_inputs_no_pair_of_the_rank_misses_less(count: int) -> None:
    residual, x = gaussian(30, 20), inputs(count, 20)
    moment = x.T @ x / count
    left, right = correction(residual, moment, 5)
    missed = (x @ (residual - left @ right).T).norm()
    # Eckart and Young: the singular values of the outputs that are left over.
    least = torch.linalg.svdvals((x @ residual.T).double())[5:].norm()
    assert float(missed) == pytest.approx(float(least), rel=2e-3, abs=1e-3)
    assert missed < (x @ (residual - torch.matmul(*factors(residual, 5))).T).norm()


def test_a_residual_of_lower_rank_and_no_inputs_at_all() -> None:
    residual = gaussian(6, 1) @ gaussian(1, 9)
    for moment in (torch.eye(9), torch.zeros(9, 9)):
        left, right = correction(residual, moment, 12)
        assert (left.shape, right.shape) == ((6, 12), (12, 9))
        torch.testing.assert_close(left @ right, residual, rtol=1e-4, atol=1e-4)
    assert not torch.matmul(*factors(torch.zeros(6, 9), 2)).any()


def test_it_rescues_what_has_a_direction() -> None:
    # Two outputs' worth of weights that stand out in all columns: a scale a block cannot follow them.
    generator = torch.Generator().manual_seed(9)
    weight = gaussian(64) + 8 * torch.randn(64, 1, generator=generator) * gaussian(1)
    plain, corrected = error(weight, Grouped(2)), error(weight, LowRank(Grouped(2), 8))
    assert corrected < 0.8 * plain
    assert error(gaussian(), LowRank(Planes(4), 8)) < error(gaussian(), Planes(4))


def test_a_linear_is_the_bases_own_and_two_products() -> None:
    found = program(common.LINEAR)
    QuantizeWeights(LowRank(Grouped(4, 32), 4)).run(found)
    names = [call.partition("(")[0] for call in calls(found)]
    assert names.count("einfold.quantized_linear") == 2
    assert names.count("einfold.linear") == 4
    assert names.count("einfold.stored_embedding") == 1
    other = program(common.LINEAR)
    QuantizeWeights(LowRank(Planes(4), 4)).run(other)
    told = [call for call in calls(other) if call.startswith("einfold.stored_linear")]
    assert len(told) == 2 and all('"planes(' in call for call in told)
    assert Interpreter(other).run({"input_ids": common.IDS})["l"].isfinite().all()


def test_a_solver_puts_base_and_correction_together() -> None:
    weight, scheme = gaussian(20, 40), LowRank(Planes(2), 4)
    base = RoundToNearest().solve(weight, scheme.base, {}).pieces
    left, right = correction(
        weight - scheme.base.dequantize(base, 40), torch.diag(torch.linspace(0, 9, 40)), 4
    )
    pieces = scheme.joined(base, left, right)
    assert {name: tuple(each.shape) for name, each in pieces.items()} == {
        name: shape for name, (shape, _) in scheme.pieces((20, 40)).items()
    }
    back = scheme.dequantize(pieces, 40)
    want = scheme.base.dequantize(base, 40) + left @ right
    torch.testing.assert_close(back, want, rtol=1e-2, atol=1e-3)


def test_text_of_a_scheme_within_a_scheme() -> None:
    scheme = LowRank(Planes(8, read=4), 8)
    assert str(scheme) == "lowrank(base=planes(bits=8,read=4,block=32),rank=8)"
    assert read_scheme("lowrank") == LowRank(Grouped(), 16)
    assert scheme.adapted(rank=2, bits=6) == LowRank(Planes(6, read=4), 2)


@pytest.mark.parametrize(
    "text",
    [
        "lowrank(base=planes(bits=8,rank=8)",
        "lowrank(base=planes(bits=8)),rank=8)",
        "lowrank(base=nothing(bits=8),rank=8)",
        "lowrank(base=,rank=8)",
        "lowrank(base=half,rank=8)",
        "lowrank(base=planes(bits=8),rank=0)",
        "planes(bits=grouped(bits=4))",
        "lowrank(base=" * 2000 + "planes" + ")" * 2000,
    ],
)
def test_texts_of_no_scheme(text: str) -> None:
    with pytest.raises(IRError):
        read_scheme(text)


def test_what_has_no_codes_cannot_be_corrected() -> None:
    for base in (Half(), LowRank()):
        with pytest.raises(IRError, match="stands beside codes"):
            LowRank(base)
