"""Low-rank corrections: the best of their rank, two products in a graph, a scheme within a scheme."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.quant.low_rank import factors
from einfold.compiler.ir.quant.scheme import Scheme, read_scheme
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.quant.schemes.lowrank import LowRank
from einfold.compiler.ir.quant.schemes.plain import Half
from einfold.compiler.ir.quant.schemes.planes import Planes
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.solve.gptq import GPTQ
from einfold.compiler.solve.hqq import HQQ
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
    left, right = factors(residual, 5, moment)
    missed = (x @ (residual - left @ right).T).norm()
    # Eckart and Young: the singular values of the outputs that are left over.
    least = torch.linalg.svdvals((x @ residual.T).double())[5:].norm()
    assert float(missed) == pytest.approx(float(least), rel=2e-3, abs=1e-3)
    assert missed < (x @ (residual - torch.matmul(*factors(residual, 5))).T).norm()


def test_a_residual_of_lower_rank_and_no_inputs_at_all() -> None:
    residual = gaussian(6, 1) @ gaussian(1, 9)
    for moment in (torch.eye(9), torch.zeros(9, 9)):
        left, right = factors(residual, 12, moment)
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


def test_a_solver_fills_the_base_and_then_the_correction_of_what_it_missed() -> None:
    weight, x, scheme = gaussian(20, 40), inputs(400, 40), LowRank(Grouped(2, 16), 4)
    moment = x.T @ x / 400
    for solver, seen in ((GPTQ(), moment), (HQQ(), None)):
        found = {} if seen is None else {"moment": seen}
        pieces = solver.solve(weight, scheme, found).pieces
        base = solver.solve(weight, scheme.base, found).pieces
        assert all(torch.equal(pieces[label], piece) for label, piece in base.items())
        left, right = factors(weight - scheme.base.dequantize(base, 40), 4, seen)
        assert torch.equal(pieces["left"], left.half())
        assert torch.equal(pieces["right"], right.half())


def test_the_correction_is_that_of_the_target_which_makes_up_for_the_inputs() -> None:
    """A base of many bits leaves nothing but the drift, which the factors must not undo."""
    weight, x = gaussian(20, 40), inputs(4000, 40)
    own = x @ (torch.eye(40) + gaussian(40, 40) / 20)
    found = {"moment": own.T @ own / 4000, "drift": (x - own).T @ own / 4000}
    scheme = LowRank(Grouped(8, 16), 8)

    def away(pieces: dict[str, Tensor], kind: Scheme) -> float:
        return float((own @ kind.dequantize(pieces, 40).T - x @ weight.T).norm())

    solver = GPTQ(drift=1.0)
    base = away(solver.solve(weight, scheme.base, found).pieces, scheme.base)
    assert away(solver.solve(weight, scheme, found).pieces, scheme) < 1.001 * base
    plain = away(GPTQ(drift=0.0).solve(weight, scheme, found).pieces, scheme)
    assert base < 0.2 * plain


def test_with_inputs_outputs_are_nearer_than_without() -> None:
    weight, x, scheme = gaussian(48, 64), inputs(1000, 64), LowRank(Grouped(2, 32), 8)
    moment = x.T @ x / 1000

    def away(pieces: dict[str, Tensor]) -> float:
        return float((x @ (scheme.dequantize(pieces, 64) - weight).T).norm())

    solved = away(GPTQ().solve(weight, scheme, {"moment": moment}).pieces)
    base = GPTQ().solve(weight, scheme.base, {"moment": moment}).pieces
    missed = weight - scheme.base.dequantize(base, 64)
    blind = away(base | scheme.beside(missed, None))
    nearest = away(RoundToNearest().solve(weight, scheme, {}).pieces)
    assert solved < 0.9 * blind and solved < 0.6 * nearest


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
