"""The product's own observers go through what holds for every observer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from einfold.compiler.calibrate.observer import OBSERVERS
from einfold.compiler.calibrate.observers.input_moments import InputMoments
from einfold.compiler.calibrate.observers.kv_bases import KVBases
from einfold.compiler.calibrate.observers.retrieval_heads import RetrievalHeads

from ..programs import program
from . import common

OWN: dict[str, common.Make] = {
    **OBSERVERS,
    "kv_bases": lambda: KVBases({"layer-0.key": 3, "layer-1.value": 5}),
    "retrieval_heads": lambda: RetrievalHeads(6),
}


@pytest.mark.parametrize("name", list(OWN))
def test_what_holds_for_every_observer(name: str, tmp_path: Path) -> None:
    common.check_found(OWN[name])
    common.check_kept(OWN[name], tmp_path / "kept")
    common.check_asked(OWN[name], tmp_path / "asked")
    common.check_refused(OWN[name])


@pytest.mark.parametrize("width", [5, 64, 77])
def test_moments_are_the_mean_of_products(width: int) -> None:
    """They are computed in parts, whether these divide the width or not."""
    own, original = torch.randn(2, 3, 20, width, generator=torch.Generator().manual_seed(0))
    (site, *_) = InputMoments().sites(program(common.BODY))
    found = InputMoments().see(replace(site, embeds=False), own, original)
    x, o = (each.flatten(0, 1).double() for each in (own, original))
    assert torch.equal(found["moment"], found["moment"].T)
    torch.testing.assert_close(found["moment"].double(), x.T @ x / 60, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["drift"].double(), (o - x).T @ x / 60, rtol=1e-5, atol=1e-6)
