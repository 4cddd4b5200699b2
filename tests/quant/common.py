"""What holds for every scheme, whoever brings it: the product's own and a toy go through the same checks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.parser import parse
from einfold.compiler.ir.printer import print_program
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.quant.scheme import Preset, Scheme, read_scheme
from einfold.compiler.ir.types import DTYPES
from einfold.compiler.ir.verifier import verify
from einfold.compiler.ir.weights import Weight
from einfold.compiler.passes.weight_quant.explicit_zeros import ExplicitZeros
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.recipe import Recipe
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.errors import RecipeError, UnsupportedError

from ..codegen.onnx.test_onnx import build
from ..programs import program

#: A table that embedding and head share, a linear, a router and experts; no width is whole blocks.
HEAD = """
    weight @e.weight : f32[600, 40]
    weight @u.weight : f32[24, 40]
    input %ids "input_ids" : i64[B, S]
    read %e "e.weight" : f32[600, 40]
    read %u "u.weight" : f32[24, 40]
    call %h = einfold.embedding(%ids, %e) : f32[B, S, 40]
    call %a = einfold.linear(%h, %u, none) : f32[B, S, 24]
    call %l = einfold.linear(%h, %e, none) : f32[B, S, 600]
"""
LINEAR = (
    HEAD
    + """
    output "l" = %l
    output "a" = %a
"""
)
BODY = (
    """
    weight @r.weight : f32[4, 24]
    weight @gu : f32[4, 36, 24]
    weight @dn : f32[4, 24, 18]
    input %x "x" : f32[N, 24]
"""
    + HEAD
    + """
    read %r "r.weight" : f32[4, 24]
    read %gu "gu" : f32[4, 36, 24]
    read %dn "dn" : f32[4, 24, 18]
    call %s = einfold.linear(%x, %r, none) : f32[N, 4]
    call %p = aten.softmax.int(%s, -1) : f32[N, 4]
    call %t = aten.topk.default(%p, 2) : (f32[N, 2], i64[N, 2])
    call %w = builtin.getitem(%t, 0) : f32[N, 2]
    call %i = builtin.getitem(%t, 1) : i64[N, 2]
    call %y = einfold.experts(%x, %i, %w, %gu, none, %dn, none, "silu", 1.0, 0.0) : f32[N, 24]
    output "l" = %l
    output "a" = %a
    output "y" = %y
"""
)
INPUTS = {
    "input_ids": torch.tensor([[0, 599, 17], [17, 3, 1]]),
    "x": torch.randn(5, 24, generator=torch.Generator().manual_seed(2)),
}
IDS = INPUTS["input_ids"]


def restored(weight: Tensor, scheme: Scheme) -> Tensor:
    """What a weight becomes, rounded to nearest."""
    pieces = RoundToNearest().solve(weight, scheme, {}).pieces
    return scheme.dequantize(pieces, weight.shape[-1])


def check_text(scheme: Scheme) -> None:
    assert read_scheme(str(scheme)) == scheme


def check_bytes(scheme: Scheme) -> None:
    """Real pieces are those of the account, and stand for something near the weight."""
    for shape in ((5, 64), (3, 7, 40), (1, 1)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        found = RoundToNearest().solve(weight, scheme, {})
        assert scheme.pieces(shape) == {
            label: (tuple(p.shape), next(n for n, d in DTYPES.items() if d == p.dtype))
            for label, p in found.pieces.items()
        }
        assert scheme.nbytes(shape) == sum(piece.nbytes for piece in found.pieces.values())
        back = scheme.dequantize(found.pieces, shape[-1])
        assert back.shape == weight.shape and back.dtype == torch.float32
        error = float((back - weight).norm() / weight.norm())
        assert error < 0.9
        assert found.error == pytest.approx(error, abs=1e-6) or scheme.nearly_exact
        check_steps(scheme, weight)
    zero = torch.zeros(2, 64)
    assert bool((restored(zero, scheme) == 0).all())


def check_steps(scheme: Scheme, weight: Tensor) -> None:
    """Codes stand for the same before and after they are packed; a settled grid stays; columns can be coded
    one by one where a scheme says so."""
    rows = weight.flatten(0, -2)
    groups = scheme.groups(rows)
    grid = scheme.settle(scheme.grid(groups))
    again = scheme.settle(grid)
    assert all(torch.equal(again[name], grid[name]) for name in grid)
    codes = scheme.nearest(groups, grid)
    values = scheme.values(codes, grid)
    assert values.dtype == torch.float32 and values.shape == groups.shape
    packed = scheme.pack(codes, grid)
    width = rows.shape[-1]
    assert torch.equal(values.flatten(1)[:, :width], scheme.dequantize(packed, width))
    if scheme.by_itself:
        part = {
            name: at[:, -1:, -1:] if at.shape[2] > 1 else at[:, -1:] for name, at in grid.items()
        }
        assert torch.equal(scheme.nearest(groups[:, -1:, -1:], part), codes[:, -1:, -1:])


def check_graph(scheme: Scheme) -> None:
    """A graph over stored weights computes what the weights that they stand for give."""
    found, plain = program(BODY), program(BODY)
    result = QuantizeWeights(scheme).run(found)
    verify(found, deep=True)
    stored = {note.where: note for note in result.notes if note.action == "applied"}
    assert set(stored) >= {"e.weight", "u.weight", "gu", "dn"}
    for name, note in stored.items():
        before = plain.weights[name]
        assert note.bytes_saved == before.nbytes - scheme.nbytes(before.shape)
        plain.weights.restore({name: Weight.of(restored(before.load(), scheme))})
    copies = {name: found.weights[name].load() for name in found.weights}
    for part in found.weights:
        assert copies[part].nbytes == found.weights[part].nbytes
    text = print_program(found)
    again = parse(text, lambda name, declared: Weight.of(copies[name]))
    assert print_program(again) == text
    want, got = (Interpreter(each).run(INPUTS) for each in (plain, again))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)


def check_onnx(
    scheme: Scheme,
    flavour: str,
    folder: Path,
    text: str = LINEAR,
    inputs: Mapping[str, Tensor] | None = None,
) -> str:
    """onnxruntime agrees with the reference, or the target says why not; gives the reason."""
    found, inputs = program(text), inputs or {"input_ids": IDS}
    QuantizeWeights(scheme).run(found)
    if flavour == "portable" and scheme.operators:
        ExplicitZeros().run(found)
    want = Interpreter(found).run(inputs)
    try:
        session, names = build(found, flavour, folder)
    except UnsupportedError as error:
        return str(error)
    fed = {name: value.numpy() for name, value in inputs.items()}
    for name, value in zip(names, session.run(None, fed), strict=True):
        torch.testing.assert_close(torch.from_numpy(value), want[name], rtol=2e-4, atol=2e-4)
    return ""


def check_recipe(preset: Preset) -> None:
    """A recipe takes a format by its name, and says which there are."""
    recipe = Recipe.build({"weights": {"format": preset.name, "head": "same"}})
    assert recipe.weights.preset is preset
    schemes = [step.scheme for step in recipe.weight_passes() if isinstance(step, QuantizeWeights)]
    assert schemes == ([] if preset.scheme is None else [preset.scheme])
    assert preset.bound > 0
    with pytest.raises(
        RecipeError, match=rf"weights.format is one of .*\b{preset.name}\b.*, not 'q'"
    ):
        Recipe.build({"weights": {"format": "q"}})


def stored(scheme: Scheme) -> Program:
    """The program with its weights in a scheme."""
    found = program(BODY)
    QuantizeWeights(scheme).run(found)
    return found
