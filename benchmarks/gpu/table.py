"""What the benchmarks of kernels share: a table that is written row by row, and peers beside each row."""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

RESULTS = Path(__file__).parent.parent / "results"

Peer = TypeVar("Peer")


class Table:
    """Lines that go to the terminal and to a file as they come; by default one of benchmarks/results, named
    by the day, what is measured, the device and the type."""

    def __init__(self, what: str, dtype: str, out: Path | None) -> None:
        device = torch.cuda.get_device_name()
        slug = f"{datetime.date.today()}-{what}-{device}-{dtype}".replace(" ", "-").lower()
        self._out = out or RESULTS / f"{slug}.md"
        self._lines: list[str] = []

    def add(self, *lines: str) -> None:
        self._lines += lines
        print("\n".join(lines), flush=True)
        self._out.write_text("\n".join(self._lines) + "\n")


def has_device() -> bool:
    """Whether there is a CUDA device; where there is none, it says that nothing is measured."""
    if not torch.cuda.is_available():
        print(
            "No CUDA device was found, so nothing was measured. This benchmark needs one.",
            file=sys.stderr,
        )
    return torch.cuda.is_available()


def versions() -> str:
    """The day, and what was measured with."""
    import triton

    return (
        f"{datetime.date.today()}, torch {torch.__version__}, Triton {triton.__version__}, CUDA "
        f"{torch.version.cuda}, Python {platform.python_version()}"
    )


def beside(peers: Mapping[str, Peer], timed: Callable[[Peer], float], taken: float) -> str:
    """The time of each peer over the time `taken`; what fails stands there with the reason."""
    found = []
    for name, peer in peers.items():
        try:
            found.append(f"{name} {timed(peer) / taken:.2f}x")
        except Exception as error:
            found.append(f"{name}: {first_line(error)}")
        torch.cuda.empty_cache()
    return "; ".join(found)


def first_line(error: Exception) -> str:
    """What an error says, as it fits into a cell."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:80]
    return said.replace("|", "/")
