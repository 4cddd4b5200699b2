from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from einfold import backend

#: No timing, and nobody compiles the rest: the graphs themselves are what most tests look at.
QUICK = {"measure": "never", "rest": "eager"}


@pytest.fixture(autouse=True)
def _fresh(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """No test sees what another compiled; plans are kept for the session, not in the user's folder."""
    monkeypatch.setenv("EINFOLD_CACHE", str(_plans(tmp_path_factory)))
    torch._dynamo.reset()
    backend.clear_reports()
    yield
    torch._dynamo.reset()


_folder: list[Path] = []


def _plans(factory: pytest.TempPathFactory) -> Path:
    if not _folder:
        _folder.append(factory.mktemp("plans"))
    return _folder[0]


@pytest.fixture
def run() -> Callable[..., Any]:
    """Compiles a function with the backend, found by its name, and calls it without gradients."""

    def call(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        compiled = torch.compile(function, backend="einfold", options={**QUICK, **options})
        with torch.no_grad():
            return compiled(*inputs)

    return call
