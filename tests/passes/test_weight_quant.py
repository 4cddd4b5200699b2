from __future__ import annotations

import pytest
import torch

from einfold.compiler.ir.program import Program
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.quant.schemes.plain import Half
from einfold.compiler.passes.weight_quant.explicit_zeros import ExplicitZeros
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.solve.round_to_nearest import RoundToNearest

from ..programs import calls, program, run

TIED = """
    weight @embed.weight : f32[200, 64]
    weight @up.weight : f32[96, 64]
    weight @down.weight : f32[64, 96]
    input %ids "input_ids" : i64[B, S]
    read %e "embed.weight" : f32[200, 64]
    read %u "up.weight" : f32[96, 64]
    read %d "down.weight" : f32[64, 96]
    call %h = einfold.embedding(%ids, %e) : f32[B, S, 64]
    call %a = einfold.linear(%h, %u, none) : f32[B, S, 96]
    call %b = einfold.linear(%a, %d, none) : f32[B, S, 64]
    call %l = einfold.linear(%b, %e, none) : f32[B, S, 200]
    output "logits" = %l
"""
IDS = torch.tensor([[1, 199, 7], [0, 3, 3]])


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_every_product_and_the_embedding_are_packed_and_a_shared_weight_once() -> None:
    found = program(TIED)
    want = run(found, input_ids=IDS)["logits"]
    result = QuantizeWeights(Grouped(8, 32)).run(found)
    assert [call.split("(")[0] for call in calls(found)] == [
        "einfold.quantized_embedding",
        *["einfold.quantized_linear"] * 3,
    ]
    assert [name for name in found.weights if name.startswith("embed")] == [
        "embed.packed",
        "embed.scales",
    ]
    assert relative(run(found, input_ids=IDS)["logits"], want) < 0.02
    saved = sum(note.bytes_saved for note in result.notes)
    assert saved == 4 * (200 * 64 + 2 * 96 * 64) - found.weights.nbytes


def test_the_head_and_what_it_shares_take_their_own_bits() -> None:
    found = program(TIED)
    QuantizeWeights(Grouped(4, 32), Grouped(8, 32)).run(found)
    assert found.weights["embed.packed"].shape == (200, 2, 32)
    assert found.weights["up.packed"].shape == (96, 2, 16)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 64])
def test_the_graph_computes_with_what_was_rounded(bits: int, symmetric: bool, block: int) -> None:
    found = program(TIED)
    weight, scheme = found.weights["down.weight"].load(), Grouped(bits, block, symmetric)
    QuantizeWeights(scheme).run(found)
    want = RoundToNearest().solve(weight, scheme, {}).pieces
    assert want.keys() == scheme.pieces((64, 96)).keys()
    for label, piece in want.items():
        assert torch.equal(found.weights[f"down.{label}"].load(), piece)


def test_errors_are_measured_when_weights_are_written() -> None:
    found = program(TIED)
    result = QuantizeWeights(Grouped(4, 32)).run(found)
    assert not result.measured
    for name in list(found.weights):
        found.weights[name].load()
    assert set(result.measured) == {"embed.weight", "up.weight", "down.weight"}
    assert all(0.01 < error < 0.2 for error in result.measured.values())


ROUTER = """
    weight @gate.weight : f32[4, 32]
    weight @gu : f32[4, 48, 32]
    weight @dn : f32[4, 32, 24]
    input %x "x" : f32[B, 32]
    read %g "gate.weight" : f32[4, 32]
    read %gu "gu" : f32[4, 48, 32]
    read %dn "dn" : f32[4, 32, 24]
    call %l = einfold.linear(%x, %g, none) : f32[B, 4]
    call %p = aten.softmax.int(%l, -1) : f32[B, 4]
    call %t = aten.topk.default(%p, 2) : (f32[B, 2], i64[B, 2])
    call %w = builtin.getitem(%t, 0) : f32[B, 2]
    call %i = builtin.getitem(%t, 1) : i64[B, 2]
    call %y = einfold.experts(%x, %i, %w, %gu, none, %dn, none, "silu", 1.0, 0.0) : f32[B, 32]
    output "y" = %y
"""


def test_experts_are_packed_and_routers_are_not() -> None:
    found = program(ROUTER)
    x = torch.randn(5, 32)
    want = run(found, x=x)["y"]
    result = QuantizeWeights(Grouped(8, 16)).run(found)
    assert [note.where for note in result.notes if note.action == "skipped"] == ["g"]
    assert any(call.startswith("einfold.quantized_experts") for call in calls(found))
    assert relative(run(found, x=x)["y"], want) < 0.02


@pytest.mark.parametrize("block", [32, 16])
def test_explicit_zeros_change_no_number(block: int) -> None:
    for body, inputs in ((TIED, {"input_ids": IDS}), (ROUTER, {"x": torch.randn(5, 32)})):
        found = program(body)
        QuantizeWeights(Grouped(4, block)).run(found)
        (want,) = run(found, **inputs).values()
        groups = {w: found.weights[w].shape[-1] for w in found.weights if w.endswith("scales")}
        result = ExplicitZeros().run(found)
        for note in result.notes:
            odd = groups[note.where] % 2 == 1
            assert note.action == ("skipped" if odd else "applied")
            assert (note.bytes_saved < 0) != odd
        (got,) = run(found, **inputs).values()
        assert torch.equal(got, want)
        assert not ExplicitZeros().run(found).changed


def test_half_is_a_storage_format() -> None:
    found: Program = program(TIED)
    want = run(found, input_ids=IDS)["logits"]
    before = found.weights.nbytes
    QuantizeWeights(Half()).run(found)
    assert found.weights.nbytes == before // 2
    assert {str(found.weights[name].dtype) for name in found.weights} == {"torch.float16"}
    got = run(found, input_ids=IDS)["logits"]
    assert got.dtype == torch.float32
    assert relative(got, want) < 1e-3
