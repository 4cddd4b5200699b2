"""A solver that lives wholly here, with what it observes; the product knows nothing of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from einfold.compiler.calibrate import sites
from einfold.compiler.calibrate.observer import OBSERVERS, Found, Observer
from einfold.compiler.calibrate.sites import Site
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.quant.scheme import Scheme
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.compiler.solve.solver import SOLVERS, Solved, Solver
from einfold.errors import IRError

from ..programs import program
from ..quant.common import INPUTS, LINEAR
from ..quant.test_schemes import OWN
from . import common


class Power(Observer):
    """`power` [M]: the mean square of each input of a linear."""

    name = "power"

    def sites(self, program: Program) -> list[Site]:
        return sites.weight_inputs(program)

    def see(self, site: Site, *values: Any) -> Found:
        return {"power": values[0].square().flatten(0, -2).mean(0)}


@dataclass(frozen=True)
class Clip(Solver):
    """Shrinks the range of a weight as far as the error of its outputs falls."""

    steps: int = 5

    name = "clip"
    observes = ("power",)

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Mapping[str, Tensor]) -> Solved:
        power = statistics.get("power", torch.ones(weight.shape[-1]))
        rows = weight.reshape(-1, weight.shape[-1])
        best: tuple[float, dict[str, Tensor], float] | None = None
        for step in range(self.steps):
            grid = scheme.grid(scheme.groups(rows * (1 - 0.05 * step)))
            pieces = scheme.pack(scheme.nearest(scheme.groups(rows), grid), grid)
            off = scheme.dequantize(pieces, rows.shape[1]) - rows
            loss = float((off.square() * power).sum())
            if best is None or loss < best[0]:
                best = loss, pieces, float(off.norm() / rows.norm())
        assert best is not None
        shapes = {label: shape for label, (shape, _) in scheme.pieces(tuple(weight.shape)).items()}
        return Solved({n: p.reshape(shapes[n]) for n, p in best[1].items()}, best[2])


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with SOLVERS.with_one_more(Clip), OBSERVERS.with_one_more(Power):
        yield


@pytest.mark.parametrize("scheme", OWN, ids=str)
def test_what_holds_for_every_solver(scheme: Scheme) -> None:
    common.check_pieces(Clip(), scheme, {"power": torch.arange(1.0, 41)})
    common.check_graph(Clip(), scheme)


def test_it_is_given_what_its_observer_found() -> None:
    """Channels that are never used cost nothing: what is stored differs from rounding without a text."""
    table = torch.randn(600, 40)
    table[:, 8:] = 0
    found, plain = (program(LINEAR, **{"e.weight": table}) for _ in range(2))
    scheme = Grouped(2, 32)
    weight = plain.weights["u.weight"].load()
    QuantizeWeights(scheme, solver=Clip()).run(found)
    with pytest.raises(IRError, match="asked for before calibration"):
        found.weights["u.packed"].load()
    found.calibrations[0].run(INPUTS["input_ids"])
    pieces = {label: found.weights[f"u.{label}"].load() for label in ("packed", "scales")}
    power = table[INPUTS["input_ids"]].square().mean((0, 1))
    want = Clip().solve(weight, scheme, {"power": power}).pieces
    assert all(torch.equal(pieces[label], want[label]) for label in pieces)
    rounded = RoundToNearest().solve(weight, scheme, {}).pieces
    used = [(scheme.dequantize(p, 40) - weight)[:, :8].norm() for p in (pieces, rounded)]
    assert used[0] < used[1]
    assert "u.weight" in plain.weights


def test_an_unknown_solver_is_said_with_those_that_there_are() -> None:
    with pytest.raises(
        IRError,
        match="unknown solver 'q'; known: autoround, awq, clip, decoupleq, distill, gptq, hqq, "
        "round_to_nearest",
    ):
        SOLVERS.find("q")
