"""Weights in codes keep their pieces where only rows move, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.stored import (
    StoredWeight,
    TurnedWeight,
    cast,
    picked,
    scheme_of,
    stacked,
)
from einfold.compiler.ir.weights import Weight
from einfold.compiler.passes.cleanup.fold_constants import FoldConstants
from einfold.compiler.passes.weight_quant.keep_codes import KeepCodes
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.solve.round_to_nearest import RoundToNearest

from ..programs import calls, program

SCHEME = Grouped(4, 16, symmetric=False)


def stored(*shape: int, scheme: Grouped = SCHEME, seed: int = 0) -> StoredWeight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    pieces = RoundToNearest().solve(weight, scheme, {}).pieces
    return StoredWeight.holding(scheme, shape, {name: Weight.of(p) for name, p in pieces.items()})


def of_pieces(weight: Weight) -> Tensor:
    """What the pieces of a weight stand for."""
    assert isinstance(weight, StoredWeight)
    pieces = {name: piece.load() for name, piece in weight.pieces.items()}
    return weight.scheme.dequantize(pieces, weight.shape[-1])


def test_rows_are_stacked_and_picked_in_codes() -> None:
    one, two = stored(6, 40), stored(3, 40, seed=1)
    both = stacked([one, two])
    assert torch.equal(of_pieces(both), torch.cat((one.load(), two.load())))
    assert torch.equal(both.load(), of_pieces(both))
    order = torch.tensor([7, 0, 8, 2])
    assert torch.equal(of_pieces(picked(both, order)), both.load()[order])
    experts = stored(2, 5, 32)
    assert torch.equal(of_pieces(picked(experts, order[1:2])), experts.load()[:, :1])


def test_what_differs_is_stacked_as_numbers() -> None:
    for other in (stored(3, 40, scheme=Grouped(8, 16)), Weight.of(torch.ones(3, 40))):
        both = stacked([stored(6, 40), other])
        assert scheme_of(both) is None
        assert torch.equal(both.load()[6:], other.load())
    one = stored(6, 40)
    assert cast(one, torch.float32) is one
    assert cast(one, torch.float16).load().dtype == torch.float16


def test_other_pieces_than_the_scheme_has_are_refused() -> None:
    with pytest.raises(ValueError, match="stores"):
        StoredWeight.holding(SCHEME, (6, 40), {"packed": Weight.of(torch.zeros(6, 40))})


EXPERTS = """
    weight @w : f32[2, 32, 6]
    input %x "x" : f32[N, 32]
    read %w "w" : f32[2, 32, 6]
    call %t = aten.transpose.int(%w, 1, 2) : f32[2, 6, 32]
    call %g = aten.slice.Tensor(%t, 1, 0, 9223372036854775807, 2) : f32[2, 3, 32]
    call %u = aten.slice.Tensor(%t, 1, 1, 9223372036854775807, 2) : f32[2, 3, 32]
    call %c = aten.cat.default([%g, %u], 1) : f32[2, 6, 32]
    call %h = aten.slice.Tensor(%t, 2, 0, 16) : f32[2, 6, 16]
    call %y = aten.add.Tensor(%c, 0.0) : f32[2, 6, 32]
    call %z = aten.add.Tensor(%x, 1.0) : f32[N, 32]
    output "c" = %c
    output "h" = %h
    output "z" = %z
"""


def test_a_weight_that_a_model_turns_keeps_its_codes() -> None:
    """Turned back, its gate and up rows taken apart; columns cut out are numbers."""
    weight = stored(2, 6, 32)
    found = program(EXPERTS)
    found.weights.restore({"w": TurnedWeight.around(weight)})
    assert torch.equal(found.weights["w"].load(), weight.load().transpose(1, 2))
    FoldConstants().run(found)
    kinds = {found.weights[name].shape: found.weights[name] for name in found.weights}
    rows = torch.tensor([0, 2, 4, 1, 3, 5])
    assert torch.equal(of_pieces(kinds[2, 6, 32]), weight.load()[:, rows])
    assert scheme_of(kinds[2, 6, 16]) is None
    assert torch.equal(kinds[2, 6, 16].load(), weight.load()[:, :, :16])


LINEARS = """
    weight @a.weight : f32[6, 32]
    weight @b.weight : f32[6, 32]
    input %x "x" : f32[N, 32]
    read %a "a.weight" : f32[6, 32]
    read %b "b.weight" : f32[6, 32]
    call %y = einfold.linear(%x, %a, none) : f32[N, 6]
    call %z = einfold.linear(%x, %b, none) : f32[N, 6]
    output "y" = %y
    output "z" = %z
"""


def test_kept_codes_are_read_and_asked_ones_taken() -> None:
    weight = stored(6, 32)
    for step, told in (
        (KeepCodes(), ["einfold.quantized_linear", "einfold.linear"]),
        (QuantizeWeights(SCHEME), ["einfold.quantized_linear"] * 2),
    ):
        found = program(LINEARS)
        found.weights.restore({"a.weight": weight})
        result = step.run(found)
        assert [call.partition("(")[0] for call in calls(found)] == told
        for name, piece in weight.pieces.items():
            assert torch.equal(found.weights[f"a.{name}"].load(), piece.load())
        assert next(note.where for note in result.notes if note.action == "applied") == "a.weight"


def test_codes_in_another_scheme_are_rounded_from_their_numbers() -> None:
    weight, other = stored(6, 32), Grouped(8, 16)
    found = program(LINEARS)
    found.weights.restore({"a.weight": weight})
    QuantizeWeights(other).run(found)
    wanted = RoundToNearest().solve(weight.load(), other, {}).pieces
    for name, piece in wanted.items():
        assert torch.equal(found.weights[f"a.{name}"].load(), piece)
