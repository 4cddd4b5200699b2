"""What holds for every solver, whoever brings it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.kept import cache_home
from einfold.compiler.ir.quant.scheme import Scheme
from einfold.compiler.ir.types import DTYPES
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.solve.gptq import GPTQ
from einfold.compiler.solve.solver import Solved, Solver

from ..programs import program, run
from ..quant.common import INPUTS, LINEAR


@dataclass(frozen=True)
class Seen(GPTQ):
    """GPTQ that tells what it was shown, and may be stopped."""

    shown: ClassVar[list[dict[str, Tensor]]] = []
    stop: ClassVar[int] = 100

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Mapping[str, Tensor]) -> Solved:
        if len(self.shown) == Seen.stop:
            raise KeyboardInterrupt
        self.shown.append(dict(statistics))
        return super().solve(weight, scheme, statistics)


def check_resumed(
    solved: Callable[[], Mapping[str, Tensor]], stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped at a weight and begun anew ends as one that was not; `shown` tells of both its
    parts."""
    with monkeypatch.context() as apart:
        apart.setenv("EINFOLD_CACHE", str(cache_home() / "other"))
        want = solved()
    Seen.shown.clear()
    monkeypatch.setattr(Seen, "stop", stop)
    with pytest.raises(KeyboardInterrupt):
        solved()
    monkeypatch.setattr(Seen, "stop", 100)
    got = solved()
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


def check_pieces(solver: Solver, scheme: Scheme, statistics: Mapping[str, Tensor]) -> None:
    """The pieces are those of the scheme, the same each time, and as far from the weight as is said."""
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    one, two = (solver.solve(weight, scheme, statistics) for _ in range(2))
    expected = scheme.pieces((6, 40))
    assert one.pieces.keys() == expected.keys()
    for label, (shape, kind) in expected.items():
        assert one.pieces[label].shape == shape and one.pieces[label].dtype == DTYPES[kind]
        assert torch.equal(one.pieces[label], two.pieces[label])
    if one.error is not None:
        away = (scheme.dequantize(one.pieces, 40) - weight).norm() / weight.norm()
        assert one.error == pytest.approx(float(away), rel=1e-4)


def check_graph(solver: Solver, scheme: Scheme) -> None:
    """The pass stores what the solver gives, once what it observes was observed."""
    found, plain = program(LINEAR), program(LINEAR)
    result = QuantizeWeights(scheme, solver=solver).run(found)
    assert len(found.calibrations) == solver.reads
    for calibration in found.calibrations:
        calibration.run(INPUTS["input_ids"])
    inputs = run(plain, **INPUTS)
    for name in list(found.weights):
        assert found.weights[name].load().shape == found.weights[name].shape
    for name, value in run(found, **INPUTS).items():
        assert float((value - inputs[name]).norm() / inputs[name].norm()) < 0.9
    assert result.changed
    told = QuantizeWeights(scheme, solver=solver).options()["solver"]
    assert str(told).partition("(")[0] == solver.name
