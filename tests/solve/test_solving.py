"""Weights that are solved along a text: what each solver is shown, and runs that were interrupted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from einfold.compiler.ir.kept import cache_home
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.quant.scheme import Scheme
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.quant.schemes.lowrank import LowRank
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.solve import solving
from einfold.compiler.solve.gptq import GPTQ
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.errors import ModelError

from ..calibrate.common import BODY, TEXT
from ..programs import program
from .common import Seen, check_resumed

#: A second linear behind the attention, so that one is solved behind another, and a head of its own.
TWO = (
    BODY.replace(
        "weight @w.weight : f32[16, 16]",
        "weight @w.weight : f32[16, 16]\n    weight @u.weight : f32[16, 16]\n    weight @o : f32[11, 16]",
    )
    .replace(
        "    call %r = einfold.select_rows(%f, %rows)",
        '    read %u "u.weight" : f32[16, 16]\n'
        "    call %g = einfold.linear(%f, %u, none) : f32[B, S, 16]\n"
        '    read %n "o" : f32[11, 16]\n'
        "    call %r = einfold.select_rows(%g, %rows)",
    )
    .replace("linear(%r, %e, none)", "linear(%r, %n, none)")
)
SCHEME = Grouped(2, 16)

#: The second linear makes half as many numbers as it reads.
FEWER = (
    TWO.replace("weight @u.weight : f32[16, 16]", "weight @u.weight : f32[8, 16]")
    .replace('"u.weight" : f32[16, 16]', '"u.weight" : f32[8, 16]')
    .replace("linear(%f, %u, none) : f32[B, S, 16]", "linear(%f, %u, none) : f32[B, S, 8]")
    .replace("select_rows(%g, %rows) : f32[N, 16]", "select_rows(%g, %rows) : f32[N, 8]")
    .replace("f32[11, 16]\n    call %r", "f32[11, 8]\n    call %r")
    .replace("weight @o : f32[11, 16]", "weight @o : f32[11, 8]")
)


def solved(
    text: Tensor = TEXT, solver: GPTQ | None = None, body: str = TWO
) -> tuple[Program, dict[str, Tensor]]:
    found = program(body)
    QuantizeWeights(SCHEME, solver=solver or Seen()).run(found)
    (calibration,) = found.calibrations
    calibration.run(text)
    return found, {name: found.weights[name].load() for name in found.weights}


def inputs_of_u(found: Program, weight_NM: Tensor) -> Tensor:
    """The inputs of the second linear, where the first has this weight."""
    from einfold.compiler.calibrate.observers.input_moments import InputMoments
    from einfold.compiler.calibrate.stream import stream
    from einfold.compiler.ir.weights import Weight

    found.weights.restore({"w.weight": Weight.of(weight_NM)})
    return stream(found, TEXT, [InputMoments()])["u.weight"]["moment"]


def test_a_weight_is_solved_on_the_inputs_that_stored_weights_give() -> None:
    _, pieces = solved()
    first, second, _ = Seen.shown
    assert float(first["drift"].abs().max()) == 0
    assert float(second["drift"].abs().max()) > 0
    stored = SCHEME.dequantize({n: pieces[f"w.{n}"] for n in ("packed", "scales")}, 16)
    torch.testing.assert_close(second["moment"], inputs_of_u(program(TWO), stored))
    original = inputs_of_u(program(TWO), program(TWO).weights["w.weight"].load())
    assert float((second["moment"] - original).norm() / original.norm()) > 0.01


def test_the_head_sees_every_token_as_both_models_have_it() -> None:
    """Its inputs are what the linear before it gives, of all tokens: their moments follow from its own. It
    has fewer rows than columns, so that drift is given as it is felt in its products."""
    _, pieces = solved()
    _, before, head = Seen.shown
    original = program(TWO).weights["u.weight"].load()
    stored = SCHEME.dequantize({n: pieces[f"u.{n}"] for n in ("packed", "scales")}, 16)
    moment = stored @ before["moment"] @ stored.T
    torch.testing.assert_close(head["moment"], moment, rtol=1e-4, atol=1e-4)
    both = original @ (before["drift"] + before["moment"]) @ stored.T
    weight = program(TWO).weights["o"].load()
    torch.testing.assert_close(head["drifted"], weight @ (both - moment), rtol=1e-4, atol=1e-4)


def test_a_table_that_a_head_shares_is_solved_to_serve_tokens_too() -> None:
    found = program(BODY)
    result = QuantizeWeights(SCHEME, solver=Seen()).run(found)
    assert {note.where for note in result.notes} >= {"w.weight", "e"}
    found.calibrations[0].run(TEXT)
    _, table = Seen.shown
    assert table.keys() == {"moment"}  # it stays what it is, whatever the head's inputs have become
    least = float(torch.linalg.eigvalsh(table["moment"]).min())
    assert least > 0.3 * float(table["moment"].diagonal().median())  # in every direction
    plain = RoundToNearest().solve(program(BODY).weights["e"].load(), SCHEME, {}).pieces
    assert not torch.equal(found.weights["e.packed"].load(), plain["packed"])


def test_a_table_that_something_else_reads_too_is_solved_without_its_inputs() -> None:
    scaled = BODY.replace(
        "    call %h = einfold.embedding(%ids, %e)",
        "    call %t = aten.mul.Tensor(%e, 2.0) : f32[11, 16]\n    call %h = einfold.embedding(%ids, %t)",
    )
    found = program(scaled)
    QuantizeWeights(SCHEME, solver=Seen()).run(found)
    found.calibrations[0].run(TEXT)
    plain = RoundToNearest().solve(program(scaled).weights["e"].load(), SCHEME, {}).pieces
    assert torch.equal(found.weights["e.packed"].load(), plain["packed"])
    assert [bool(each) for each in Seen.shown] == [True, False]


@pytest.mark.parametrize("stop", [1, 2])
def test_an_interrupted_run_ends_as_one_that_was_not(
    stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is solved twice but what is in front of a product whose inputs were narrowed: the head's."""
    check_resumed(lambda: solved()[1], stop, monkeypatch)
    assert len(Seen.shown) == 2 + stop


@pytest.mark.parametrize("stop", [1, 2])
def test_a_text_in_parts_is_read_as_one(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same statistics, and a run that was interrupted goes on with all parts."""
    solved()
    whole = [*Seen.shown]
    monkeypatch.setattr(solving, "_TOKENS", TEXT.shape[1])
    monkeypatch.setattr(solving, "_VERSION", "in parts")
    assert len(TEXT) > 1
    check_resumed(lambda: solved()[1], stop, monkeypatch)
    assert len(Seen.shown) == 2 + stop
    for one, several in zip(whole, [Seen.shown[0], *Seen.shown[-2:]], strict=True):
        assert one.keys() == several.keys()
        for name, value in one.items():
            torch.testing.assert_close(several[name], value, rtol=1e-3, atol=1e-3)


def test_inputs_of_the_original_go_before_a_weight_is_solved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a linear makes fewer numbers than it reads. The same is solved to the bit, and run by run."""
    held: list[int] = []
    narrows, product = solving._Solve.narrows, solving._Solve.product

    def seen(self: solving._Solve, read: bool, *arguments: Any) -> Tensor:
        if self._site.name == "u.weight":
            held.append(len(arguments[0]))
        return product(self, read, *arguments)

    monkeypatch.setattr(solving, "_TOKENS", TEXT.shape[1])
    monkeypatch.setattr(solving._Solve, "product", seen)
    monkeypatch.setattr(solving._Solve, "narrows", lambda *_: False)
    whole = solved(body=FEWER)[1]
    assert held == [2] * len(TEXT)
    held.clear()
    monkeypatch.setattr(solving._Solve, "narrows", narrows)
    monkeypatch.setattr(solving, "_VERSION", "narrow")
    for stop in (1, 2):
        check_resumed(lambda: solved(body=FEWER)[1], stop, monkeypatch)
        monkeypatch.setattr(solving, "_VERSION", f"narrow {stop}")
    found = solved(body=FEWER)[1]
    assert {*held} == {1}
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_products_of_a_part_alone_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is as large as what a linear gives for all of the text, but the statistics' own."""
    rows = 40
    monkeypatch.setattr(solving, "_TOKENS", TEXT.shape[1])
    text = TEXT[:1].repeat(rows, 1)

    class Largest(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.numbers = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32:
                self.numbers = max(self.numbers, out.numel())
            return out

    with Largest() as largest:
        solved(text)
    assert 2 * TEXT.shape[1] * 16 <= largest.numbers < text.numel() * 16 // 4


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["w.weight", "o"])
def test_a_weight_that_is_not_finite_is_named(name: str, number: float) -> None:
    table = program(TWO).weights[name].load()
    table[3, 2] = number
    found = program(TWO, **{name: table})
    QuantizeWeights(SCHEME, solver=Seen()).run(found)
    with pytest.raises(
        ModelError, match=f"the weight {name} has numbers that are infinite or none"
    ):
        found.calibrations[0].run(TEXT)


@pytest.mark.parametrize("scheme", [SCHEME, LowRank(SCHEME, 4)], ids=str)
def test_dead_channels_and_moments_of_rank_one(scheme: Scheme) -> None:
    """A text of one token, whose embedding is 0 in some channels: the moments of the first linear have rank
    1 and zeros on their diagonal. What such channels are multiplied with is rounded to nearest."""
    dead = [0, 5, 15]
    table = program(TWO).weights["e"].load()
    table[:, dead] = 0
    found = program(TWO, e=table)
    QuantizeWeights(scheme, head=SCHEME, solver=Seen(fit=False)).run(found)
    found.calibrations[0].run(torch.full_like(TEXT, 3))
    moment = Seen.shown[0]["moment"]
    assert int(torch.linalg.matrix_rank(moment)) == 1 and not moment.diagonal()[dead].any()
    for name in ("w", "u"):
        pieces = {n: found.weights[f"{name}.{n}"].load() for n in scheme.pieces((16, 16))}
        assert all(bool(piece.isfinite().all()) for piece in pieces.values())
        original = program(TWO, e=table).weights[f"{name}.weight"].load()
        apart = scheme.dequantize(pieces, 16) - original
        assert float(apart.norm() / original.norm()) < 0.8
        if name == "w" and scheme == SCHEME:
            nearest = RoundToNearest().solve(original, SCHEME, {}).pieces
            want = SCHEME.dequantize(nearest, 16) - original
            torch.testing.assert_close(apart[:, dead], want[:, dead], rtol=1e-3, atol=1e-3)


def test_what_was_solved_is_found_again_and_only_for_the_same() -> None:
    _, first = solved()
    _, again = solved()
    assert len(Seen.shown) == 3 and all(torch.equal(first[n], again[n]) for n in first)
    solved(solver=Seen(damping=0.1))
    assert len(Seen.shown) == 6
    solved(text=(TEXT + 1) % 11)
    assert len(Seen.shown) == 9


def test_a_damaged_file_is_solved_again() -> None:
    _, first = solved()
    (folder,) = (cache_home() / "solved").iterdir()
    (folder / "u.weight.pt").write_bytes(b"nothing")
    _, again = solved()
    assert len(Seen.shown) > 3 and all(torch.equal(first[n], again[n]) for n in first)


def test_few_models_are_kept() -> None:
    for damping in range(6):
        solved(solver=Seen(damping=0.01 + damping))
    assert len([*(cache_home() / "solved").iterdir()]) == 4


def test_without_a_text_nothing_is_kept_or_read() -> None:
    found = program(TWO)
    QuantizeWeights(SCHEME, solver=RoundToNearest()).run(found)
    assert not found.calibrations
