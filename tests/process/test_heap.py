"""Large blocks do not stay in the heap of the C library."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

#: Large blocks with something small between them, let go of: what a prompt's values leave.
_HOLES = """
import sys
import numpy as np
from einfold.compiler.ir.heap import leave_from

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

np.ones(30 << 20, np.uint8)  # the largest block so far: up to its size all are of the heap from now on
if sys.argv[1] != "keep":
    leave_from(1 << 20)
if sys.argv[1] == "again":  # another runner wanted more meanwhile
    leave_from(32 << 20)
    leave_from(1 << 20)
before = resident()
blocks, between = [], []
for _ in range(20):
    blocks.append(np.ones(8 << 20, np.uint8))
    between.append(np.ones(300_000, np.uint8))
blocks.clear()
print(resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the heap is glibc's")
@pytest.mark.parametrize(("said", "stays"), [("leave", False), ("again", False), ("keep", True)])
def test_blocks_go_back_to_the_system_where_they_are_told_to(said: str, stays: bool) -> None:
    run = [sys.executable, "-c", _HOLES, said]
    left = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert left > 100 << 20 if stays else left < 10 << 20
