from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parent.parent.parent / "docs"


def load(name: str) -> ModuleType:
    """A script of `docs/` as a module."""
    if name not in sys.modules:
        spec = util.spec_from_file_location(name, DOCS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def plan_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of plans for the session."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    return load
