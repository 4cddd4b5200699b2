"""The user's cache folder: what einfold derived or measured once and would derive or measure again."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache_home() -> Path:
    """The folder: `EINFOLD_CACHE`, or `einfold` in the user's cache folder.

    For a user without a home, as in some containers, it is one that cannot be: nothing is found or kept.
    """
    named = os.environ.get("EINFOLD_CACHE")
    if named:
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "einfold"
    except RuntimeError:
        return Path(os.devnull) / "einfold"


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a file of the cache whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file)
        os.replace(name, path)
    except OSError:
        # A cache that cannot be written costs time, not correctness.
        return
