"""Programs of tiny models, traced once for all tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from einfold.compiler.driver import load_weights, open_model, trace
from einfold.compiler.ir.program import Program
from einfold.compiler.recipe import Recipe

from .. import models


@cache
def traced(folder: Path) -> Program:
    model = open_model(folder)
    load_weights(model)
    found, _ = trace(model, Recipe.model_validate({"target": "reference"}))
    return found


@pytest.fixture
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    folder = tmp_path_factory.getbasetemp() / f"arena-{request.param}"
    if not folder.exists():
        models.save(request.param, folder)
    return traced(folder)
