"""Tests that need a disk: where folders are memory there are no packed copies, and nothing to let go of."""

from __future__ import annotations

from pathlib import Path

import pytest

from einfold.runtime.memory.filesystem import held_in_memory


def needs_a_disk(folder: Path) -> None:
    """Skips a test whose folder is held in memory, such as /tmp on some systems; --basetemp names another."""
    memory = held_in_memory(folder)
    if memory:
        pytest.skip(f"{folder} is on {memory}")
