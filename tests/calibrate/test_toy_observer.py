"""An observer that lives wholly here passes what every observer passes, and shares a stream with others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from einfold.compiler.calibrate import sites
from einfold.compiler.calibrate.observer import OBSERVERS, Found, Observer
from einfold.compiler.calibrate.observers.attention_mass import AttentionMass
from einfold.compiler.calibrate.observers.kv_ranges import KVRanges
from einfold.compiler.calibrate.sites import Site
from einfold.compiler.calibrate.stream import stream
from einfold.compiler.ir.program import Program

from ..programs import program
from . import common


@dataclass
class Hessian(Observer):
    """`hessian` [M, M]: the mean product of each linear's inputs with themselves, and a little damping."""

    damping: float = 0.01

    name = "hessian"

    @property
    def key(self) -> str:
        return f"hessian-{self.damping}"

    def sites(self, program: Program) -> list[Site]:
        return sites.weight_inputs(program)

    def see(self, site: Site, *values: Any) -> Found:
        x_TM = values[0].flatten(0, -2)
        return {"hessian": x_TM.T @ x_TM / len(x_TM) + self.damping * torch.eye(x_TM.shape[1])}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with OBSERVERS.with_one_more(Hessian):
        yield


def test_what_holds_for_every_observer(tmp_path: Path) -> None:
    assert OBSERVERS["hessian"] is Hessian
    found = common.check_found(Hessian)
    assert set(found) == {"w.weight", "e"}
    common.check_kept(Hessian, tmp_path / "kept")
    common.check_asked(Hessian, tmp_path / "asked")
    common.check_refused(Hessian)


def test_one_stream_serves_all_of_them() -> None:
    makes: list[common.Make] = [Hessian, AttentionMass, KVRanges]
    apart = [stream(program(common.BODY), common.TEXT, [make()]) for make in makes]
    together = stream(program(common.BODY), common.TEXT, [make() for make in makes])
    assert common.equal(together, {name: at for found in apart for name, at in found.items()})
