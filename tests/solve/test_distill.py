"""Distillation: scales of a whole model, derived layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.kept import cache_home
from einfold.compiler.ir.ops.record import seen_through
from einfold.compiler.ir.quant.scheme import find_scheme
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.solve import distilling, solving
from einfold.compiler.solve.distill import Distill, _Moved
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.compiler.solve.solver import Solved, Solver, Stored, Whole
from einfold.errors import CalibrationError, IRError

from ..programs import program
from . import common
from .layered import BLOCKS, FUSED, WEIGHTS, inputs_of, layers_behind, logits

SCHEME = Grouped(3, 16, False)
HEAD = Grouped(4, 16)

#: Parts of one row each: one is judged by, the others are learned from.
TEXT = torch.randint(11, (6, 24), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Shown(Distill):
    """It tells of what was lost of the whole text before and after, and may be stopped at a step."""

    lost: ClassVar[list[tuple[float, float]]] = []
    stop: ClassVar[int] = 1000

    def distill(self, model: Whole) -> dict[str, Solved]:
        def restored(name: str, solved: Solved | None = None) -> Tensor:
            scheme, begun, width = model.weights[name]
            found = solved or begun
            return found.met(scheme.dequantize(found.pieces, width))

        keep, every = model.keep, range(model.parts)

        def stopped(state: Callable[[], dict[str, Tensor]], done: int, left: int) -> None:
            keep(state, done, left)
            if done == Shown.stop:
                raise KeyboardInterrupt

        model.keep = stopped  # type: ignore[method-assign]
        found = super().distill(model)
        self.lost.append(
            (model.lost(restored, every), model.lost(lambda n: restored(n, found.get(n)), every))
        )
        return found


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    Shown.lost.clear()
    monkeypatch.setattr(Shown, "stop", 1000)
    monkeypatch.setattr(solving, "_TOKENS", TEXT.shape[1])
    monkeypatch.setattr(distilling, "_EVERY", 0.0)


def solved(solver: Solver, body: str = BLOCKS, text: Tensor = TEXT) -> dict[str, Tensor]:
    found = program(body, **WEIGHTS)
    QuantizeWeights(SCHEME, head=HEAD, solver=solver).run(found)
    for calibration in found.calibrations:
        calibration.run(text)
    return {name: found.weights[name].load() for name in found.weights}


@pytest.mark.parametrize("start", ["round_to_nearest", "decoupleq"])
def test_what_holds_for_every_solver(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solving, "_TOKENS", 1)  # a row is a part
    solver = Distill(start=start, steps=4)
    statistics = {"moment": torch.eye(40)} if start == "decoupleq" else {}
    common.check_pieces(solver, SCHEME, statistics)
    common.check_graph(solver, SCHEME)


@pytest.mark.parametrize("behind", ["h1", "t1", "n1"])
def test_slopes_of_layers_are_those_of_the_whole(
    behind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is read twice, by the embedding and by the head: what both ask of it adds up. Layers may end
    behind a call that gives two results."""
    body = BLOCKS if behind == "h1" else FUSED

    monkeypatch.setattr(distilling, "layers", layers_behind(behind))
    compared: list[int] = []

    @dataclass(frozen=True)
    class Compared(Distill):
        def distill(self, model: Whole) -> dict[str, Solved]:
            whole = program(body, **WEIGHTS)
            leaves = {
                n: model.weights[n].scheme.dequantize(s.solved.pieces, s.width)
                for n, s in model.weights.items()
            }
            for leaf in leaves.values():
                leaf.requires_grad_()
            part = TEXT[2:3]
            run = Interpreter(whole, instead=seen_through(), kept=dict(leaves), gradients=True)
            with torch.enable_grad():
                own = run.run(inputs_of(part))["logits"].log_softmax(-1)
            want = logits(program(body, **WEIGHTS), part).log_softmax(-1)
            lost = functional.kl_div(own, want, reduction="batchmean", log_target=True)
            slopes = dict(zip(leaves, torch.autograd.grad(lost, [*leaves.values()]), strict=True))
            found: dict[str, Tensor] = {}
            for name, slope in model.slopes(lambda name: leaves[name].detach(), 2):
                found[name] = found[name] + slope if name in found else slope
            assert found.keys() == slopes.keys() == {*WEIGHTS, "e"}
            for name, slope in slopes.items():
                assert float(slope.norm()) > 1e-4
                torch.testing.assert_close(found[name], slope, rtol=1e-4, atol=1e-6)
            assert model.lost(lambda name: leaves[name].detach(), [2]) == pytest.approx(
                float(lost.detach()), rel=1e-4
            )
            compared.append(len(found))
            return {}

    solved(Compared(start="round_to_nearest"), body)
    assert compared == [5]


@pytest.mark.parametrize("start", ["round_to_nearest", "gptq", "decoupleq"])
def test_the_model_comes_nearer_to_the_original(start: str) -> None:
    begun = solved(Distill(start=start).begun)
    pieces = solved(Shown(start=start, steps=60, rate=0.01))
    ((before, after),) = Shown.lost
    assert after < 0.9 * before
    moved = {name for name in pieces if not torch.equal(pieces[name], begun[name])}
    assert moved and all(name.endswith(".scales") for name in moved)


def test_a_model_that_comes_no_nearer_stays_as_it_was() -> None:
    begun = solved(Distill().begun)
    pieces = solved(Shown(steps=3, rate=0.99))
    assert all(torch.equal(pieces[name], begun[name]) for name in begun)
    ((before, after),) = Shown.lost
    assert after == before


@pytest.mark.parametrize("stop", [1, 7])
def test_an_interrupted_run_ends_as_one_that_was_not(
    stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as apart:
        apart.setenv("EINFOLD_CACHE", str(cache_home() / "other"))
        want = solved(Shown(steps=12))
    monkeypatch.setattr(Shown, "stop", stop)
    with pytest.raises(KeyboardInterrupt):
        solved(Shown(steps=12))
    monkeypatch.setattr(Shown, "stop", stop + 1)  # it goes on behind what was kept, not before it
    with pytest.raises(KeyboardInterrupt):
        solved(Shown(steps=12))
    monkeypatch.setattr(Shown, "stop", 1000)
    got = solved(Shown(steps=12))
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    assert len(Shown.lost) == 2
    solved(Shown(steps=12))
    assert len(Shown.lost) == 2  # what is whole is not tuned again
    assert not [*cache_home().rglob(distilling._STATE)]


def test_many_words_are_read_in_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []

    @dataclass(frozen=True)
    class Counted(Distill):
        def distill(self, model: Whole) -> dict[str, Solved]:
            parts.append(model.parts)
            return {}

    monkeypatch.setattr(solving, "_TOKENS", 3 * TEXT.shape[1])
    for logits_at_a_time, count in ((1 << 26, 2), (2 * 24 * 11, 4), (1, 6)):
        monkeypatch.setattr(distilling, "_LOGITS", logits_at_a_time)
        monkeypatch.setenv("EINFOLD_CACHE", str(cache_home() / str(count)))
        solved(Counted(start="round_to_nearest"))
        assert parts[-1] == count


def test_what_it_cannot_do_is_said() -> None:
    assert "integers under scales of groups, and nf4" in Distill().refuses(find_scheme("nf4"))
    for start in ("distill", "autoround", "q"):
        with pytest.raises(IRError, match=rf"starts from one of .*gptq.*, not from '{start}'"):
            Distill(start=start)
    for steps, rate in ((0, 0.002), (1, 0.0), (1, 1.0), (1, math.nan), (1, math.inf), (1, -0.1)):
        with pytest.raises(IRError, match="a rate that is a share between 0 and 1"):
            Distill(steps=steps, rate=rate)


def test_a_slope_whose_square_is_lost_moves_nothing_far() -> None:
    weight = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    pieces = RoundToNearest().solve(weight, SCHEME, {}).pieces
    for size in (1e-38, 1e-30, 1e-25, 1e-21, 1e-10, 1.0, 1e18):
        moved = _Moved(Stored(SCHEME, Solved(pieces), 16))
        for step in range(1, 4):
            moved.learn(torch.full((2, 16), size))
            moved.move(0.01, step)
        share = moved.weight() / SCHEME.dequantize(pieces, 16)
        share = share[share.isfinite()]
        assert bool(((share > math.exp(-0.031)) & (share < math.exp(0.031))).all())


def test_a_text_of_one_part_is_refused() -> None:
    with pytest.raises(CalibrationError, match="judged by another, and the text is one part"):
        solved(Distill(), text=TEXT[:1])


def test_a_text_whose_logits_are_not_finite_is_refused() -> None:
    table = program(BLOCKS).weights["e"].load() * 1e30
    found = program(BLOCKS, e=table)
    QuantizeWeights(SCHEME, solver=Distill(start="round_to_nearest")).run(found)
    with pytest.raises(CalibrationError, match="not finite"):
        found.calibrations[0].run(TEXT)
