"""The user's cache folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from einfold.compiler.ir.kept import cache_home, write_json


def test_a_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number which no account has."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("EINFOLD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    folder = cache_home()
    write_json(folder / "plans" / "x.json", {"a": 1})
    assert not (folder / "plans").is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_home() == Path("/somewhere/einfold")
    monkeypatch.setenv("EINFOLD_CACHE", "/elsewhere")
    assert cache_home() == Path("/elsewhere")
