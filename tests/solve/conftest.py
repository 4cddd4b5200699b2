from __future__ import annotations

from pathlib import Path

import pytest

from einfold.compiler.solve import solving

from .common import Seen


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is solved in a test is found by no other, and kept at every place where it can be."""
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path))
    monkeypatch.setattr(solving, "_EVERY", 0.0)
    monkeypatch.setattr(Seen, "stop", 100)
    Seen.shown.clear()
