"""The product's own observers go through what holds for every observer."""

from __future__ import annotations

from pathlib import Path

import pytest

from einfold.compiler.calibrate.observer import OBSERVERS
from einfold.compiler.calibrate.observers.kv_bases import KVBases
from einfold.compiler.calibrate.observers.retrieval_heads import RetrievalHeads

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
