"""AutoRound: layers whose linears make up for each other, from wherever codes began."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.kept import cache_home
from einfold.compiler.ir.quant.scheme import find_scheme
from einfold.compiler.ir.quant.schemes.grouped import BITS, Grouped
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.solve import solving, tuning
from einfold.compiler.solve.autoround import AutoRound
from einfold.compiler.solve.decoupleq import DecoupleQ
from einfold.compiler.solve.solver import Layer, Solved, Solver
from einfold.compiler.solve.tuning import layers
from einfold.errors import CalibrationError, IRError

from ..calibrate.common import TEXT
from ..programs import program
from ..quant.common import LINEAR
from . import common
from .layered import BLOCKS, FUSED, WEIGHTS, layers_behind, logits

SCHEME = Grouped(3, 16, False)


@dataclass(frozen=True)
class Shown(AutoRound):
    """It tells of what was lost in each layer before and after, and may be stopped."""

    lost: ClassVar[list[tuple[float, float]]] = []
    stop: ClassVar[int] = 100

    def tune(self, layer: Layer) -> dict[str, Solved]:
        if len(self.lost) == Shown.stop:
            raise KeyboardInterrupt
        begun = {
            name: _restored(each.scheme, each.solved, 16) for name, each in layer.weights.items()
        }
        found = super().tune(layer)
        tuned = {name: _restored(SCHEME, each, 16) for name, each in found.items()}
        every = range(layer.parts)
        self.lost.append((layer.lost(begun, every), layer.lost(begun | tuned, every)))
        return found


def _restored(scheme: Grouped, solved: Solved, width: int) -> Tensor:
    weight = scheme.dequantize(solved.pieces, width)
    return weight if solved.channels is None else weight / solved.channels


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    Shown.lost.clear()
    monkeypatch.setattr(Shown, "stop", 100)
    monkeypatch.setattr(solving, "_TOKENS", TEXT.shape[1])


def solved(solver: Solver, body: str = BLOCKS, text: Tensor = TEXT) -> dict[str, Tensor]:
    found = program(body, **WEIGHTS)
    QuantizeWeights(SCHEME, head=Grouped(8, 16), solver=solver).run(found)
    for calibration in found.calibrations:
        calibration.run(text)
    return {name: found.weights[name].load() for name in found.weights}


@pytest.mark.parametrize("start", ["round_to_nearest", "decoupleq"])
def test_what_holds_for_every_solver(start: str) -> None:
    solver = AutoRound(start=start)
    statistics = {"moment": torch.eye(40)} if start == "decoupleq" else {}
    common.check_pieces(solver, SCHEME, statistics)
    common.check_graph(solver, SCHEME)


def test_layers_end_where_the_fewest_numbers_are_needed_behind() -> None:
    found = program(BLOCKS)
    one, two = layers(found)
    assert one.stop is two.first and one.nodes[-1].name == "h1" and two.stop.op == "output"
    assert {n.target for n in two.nodes if n.op == "get_attr"} == {"w2.weight", "o2.weight"}
    wide = BLOCKS.replace("[11,", "[40,").replace("f32[N, 11]", "f32[N, 40]")
    assert (
        layers(program(wide))[1].stop.name == "l"
    )  # a head with more words than channels is of none
    assert not layers(program(LINEAR))  # nor is anything where there is no attention


@pytest.mark.parametrize(
    ("start", "reach"), [("round_to_nearest", 0.25), ("gptq", 0.02), ("decoupleq", 0.02)]
)
def test_layers_come_nearer_to_the_original(start: str, reach: float) -> None:
    """Each of them, and so what the model makes of the text."""
    pieces = solved(Shown(start=start, steps=40, reach=reach))
    assert len(Shown.lost) == 2
    assert all(after < 0.9 * before for before, after in Shown.lost)
    begun = solved(AutoRound(start=start).begun)
    want = logits(program(BLOCKS, **WEIGHTS))

    def off(pieces: dict[str, Tensor]) -> float:
        weights = {
            f"{n}.weight": SCHEME.dequantize(
                {p: pieces[f"{n}.{p}"] for p in ("packed", "low", "scales", "zeros", "low_zeros")},
                16,
            )
            for n in ("w", "o", "w2", "o2")
        }
        apart = logits(program(BLOCKS), **weights) - want
        return float((apart.norm(dim=-1) / want.norm(dim=-1)).square().mean())

    assert off(pieces) < off(begun)


def test_a_layer_may_end_behind_a_call_of_two_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "layers", layers_behind("t1"))
    solved(Shown(start="round_to_nearest", steps=40, reach=0.25), FUSED)
    assert len(Shown.lost) == 2
    assert all(after < 0.9 * before for before, after in Shown.lost)


def test_a_weight_that_two_layers_read_is_the_stored_one_in_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And none tunes it; the graph names it in front of the first."""
    shared = BLOCKS.replace("    weight @o2.weight : f32[16, 16]\n", "")
    shared = shared.replace('    read %ow2 "o2.weight" : f32[16, 16]\n', "").replace("%ow2", "%ow")
    read: list[tuple[set[str], dict[str, Tensor]]] = []
    come_to = tuning._Reading.come_to

    def seen(self: Any, span: Any, weights: Any, stored: Any) -> None:
        come_to(self, span, weights, stored)
        read.append(({*weights}, {name: self._tried[name].clone() for name in stored}))

    monkeypatch.setattr(tuning._Reading, "come_to", seen)
    pieces = solved(Shown(steps=2), shared)
    assert [tuned for tuned, _ in read] == [{"w.weight"}, {"w2.weight"}]
    kept = {p: pieces[f"o.{p}"] for p in ("packed", "low", "scales", "zeros", "low_zeros")}
    for _, stored in read:
        assert torch.equal(stored["o.weight"], SCHEME.dequantize(kept, 16))


def test_a_layer_that_comes_no_nearer_stays_as_it_was() -> None:
    """Here since every code is moved by half its levels."""
    begun = solved(DecoupleQ())
    pieces = solved(Shown(steps=2, reach=8, scale=0.9))
    assert all(torch.equal(pieces[name], begun[name]) for name in begun)
    assert all(after == before for before, after in Shown.lost)


@pytest.mark.parametrize("stop", [0, 1])
def test_an_interrupted_run_ends_as_one_that_was_not(
    stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as apart:
        apart.setenv("EINFOLD_CACHE", str(cache_home() / "other"))
        want = solved(Shown(steps=6))
    Shown.lost.clear()
    monkeypatch.setattr(Shown, "stop", stop)
    with pytest.raises(KeyboardInterrupt):
        solved(Shown(steps=6))
    monkeypatch.setattr(Shown, "stop", 100)
    got = solved(Shown(steps=6))
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    assert len(Shown.lost) == 2  # nothing was tuned twice
    solved(Shown(steps=6))
    assert len(Shown.lost) == 2


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scales", ["f32", "f16", "q8"])
def test_what_was_packed_is_opened_again(bits: int, symmetric: bool, scales: str) -> None:
    scheme = Grouped(bits, 16, symmetric, scales)
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    groups = scheme.groups(weight)
    grid = scheme.settle(scheme.grid(groups))
    codes = scheme.nearest(groups, grid)
    pieces = scheme.pack(codes, grid)
    found, opened = scheme.opened(pieces, 40)
    assert torch.equal(found, codes)
    assert all(torch.equal(opened[n].expand_as(grid[n]), grid[n]) for n in grid)
    values = scheme.values(found, opened).flatten(1)[:, :40]
    assert torch.equal(values, scheme.dequantize(pieces, 40))


def test_what_it_cannot_do_is_said() -> None:
    assert "integers under scales of groups, and nf4" in AutoRound().refuses(find_scheme("nf4"))
    with pytest.raises(IRError, match=r"starts from one of .*gptq.*, not from 'autoround'"):
        AutoRound(start="autoround")
    with pytest.raises(IRError, match="1 or more steps"):
        AutoRound(steps=0)
    for reach, scale in ((math.nan, 0.05), (math.inf, 0.05), (0.02, math.nan), (-1, 0.05)):
        with pytest.raises(IRError, match="codes that move 0 or more levels"):
            AutoRound(reach=reach, scale=scale)


def test_a_text_whose_results_are_not_finite_is_refused() -> None:
    """Squares overflow where values do not yet."""
    found = program(BLOCKS)
    table = found.weights["e"].load() * 1e30
    found = program(BLOCKS, e=table)
    QuantizeWeights(SCHEME, solver=AutoRound(start="round_to_nearest")).run(found)
    with pytest.raises(CalibrationError, match="not finite"):
        found.calibrations[0].run(TEXT)
