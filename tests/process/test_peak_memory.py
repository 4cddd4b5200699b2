"""What is said to be the largest memory of a process is its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from einfold.compiler.ir import peak_memory

_CHILD = """
from einfold.compiler.ir.peak_memory import peak_memory
print(peak_memory())
held = bytearray(100_000_000)
print(peak_memory())
"""

_PARENT = """
import subprocess, sys
held = bytearray(400_000_000)
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""


def test_a_process_that_a_larger_one_started_tells_its_own() -> None:
    said = subprocess.run(
        [sys.executable, "-c", _PARENT, _CHILD], check=True, capture_output=True, text=True
    )
    before, behind = map(int, said.stdout.split())
    assert 5e6 < before < 3e8 and before + 9e7 < behind < before + 2e8


def test_where_there_is_no_proc_the_system_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = peak_memory.peak_memory()
    monkeypatch.setattr(peak_memory, "_STATUS", tmp_path / "status")
    assert peak_memory.peak_memory() > 1e7 and peak_memory.peak_memory() >= own // 2
    (tmp_path / "status").write_text("VmHWM:\tmuch\n", encoding="ascii")
    assert peak_memory.peak_memory() > 1e7
