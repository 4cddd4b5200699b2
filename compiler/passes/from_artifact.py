"""Weights that a pass takes from an artifact in place of training them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...errors import ArtifactError, RecipeError
from ..ir.file_hash import file_hash
from ..ir.manifest import WEIGHTS, Manifest


@contextmanager
def weights_of(artifact: Path, where: str) -> Iterator[Any]:
    """An artifact's weights by name. Raises RecipeError, `where` first, where they cannot be read or are not
    those that its manifest lists."""
    try:
        with safe_open(_undamaged(artifact), framework="pt") as held:
            yield held
    except (ArtifactError, OSError, SafetensorError) as error:
        raise RecipeError(f"{where} cannot be read: {error}") from error


def _undamaged(artifact: Path) -> Path:
    """An artifact's file of weights. Raises ArtifactError where it is not the one that its manifest lists."""
    manifest = Manifest.read(artifact)
    if WEIGHTS not in manifest.files:
        raise ArtifactError(f"it has no {WEIGHTS}")
    return manifest.check_file(artifact, WEIGHTS, file_hash)
