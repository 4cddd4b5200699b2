"""Artifacts of encoder-decoders, each compiled once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import einfold

from . import common


@pytest.fixture(scope="session")
def compiled_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The artifact of a model by name, for onnxruntime; of T5 with a tokenizer."""
    made: dict[str, Path] = {}

    def compiled(name: str) -> Path:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            einfold.compile(common.save(name, root / "model", name == "t5"), root / "out")
            made[name] = root / "out"
        return made[name]

    return compiled
