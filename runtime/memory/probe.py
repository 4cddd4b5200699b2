"""Measures what a plan is made with: how fast this machine reads memory and disk."""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from ...errors import DiskError, disk_error
from .direct import PIECE, READERS, DirectFile, aligned
from .filesystem import held_in_memory
from .pages import UNIT

#: Bytes that are read of memory by each thread, larger than the caches of processors.
_RAM = 128 << 20

#: Bytes of the file that is written to be read.
_DISK = 256 << 20

#: Times that each measurement is made; the middle one counts.
_TIMES = 5


def ram_bandwidth(cores: int) -> float:
    """Bytes a second that `cores` threads read of memory together."""
    blocks = [np.ones(_RAM // 8, np.int64) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        seconds = _middle(lambda: list(pool.map(np.bitwise_or.reduce, blocks)))
    return cores * _RAM / seconds


def disk_bandwidth(folder: Path) -> tuple[float, bool]:
    """Bytes a second of reads past the page cache on the disk of a folder, and whether they were direct.

    Writes a file of 256 MiB there and removes it. Raises DiskError where that cannot be, or where the folder
    lies on no disk.
    """
    memory = held_in_memory(folder)
    if memory:
        raise DiskError(
            f"{folder} is on {memory}, which is held in memory: give a folder on the disk of your artifacts "
            "with --at"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".einfold-probe-")
    except OSError as error:
        raise DiskError(f"{folder}: {error.strerror}; give another folder with --at") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            for _ in range(_DISK // PIECE):
                stream.write(os.urandom(PIECE))  # some disks make holes of zeros
            stream.flush()
            os.fsync(stream.fileno())
        return file_bandwidth(Path(name))
    except OSError as error:
        if isinstance(error, DiskError):
            raise
        raise disk_error(error.errno or 0, name) from error
    finally:
        with suppress(OSError):
            os.unlink(name)


def file_bandwidth(path: Path) -> tuple[float, bool]:
    """Bytes a second of reading a file past the page cache, its first gigabyte at most; whether directly.

    By as many threads as bring the pages of streamed weights, in the same units, each the next: one alone
    leaves many disks half idle, and larger pieces some.
    """
    file = DirectFile(path)
    size = min(file.size, 1 << 30) // UNIT * UNIT
    free = [aligned(UNIT) for _ in range(READERS)]

    def read(place: int) -> None:
        buffer = free.pop()
        file.read(place, UNIT, buffer)
        free.append(buffer)

    def read_all() -> None:
        deque(pool.map(read, range(0, size, UNIT)), maxlen=0)

    try:
        with ThreadPoolExecutor(READERS) as pool:
            return size / _middle(read_all, 3), file.direct
    finally:
        file.close()


def ram_size() -> int:
    """Bytes of memory that this machine has, or that its container may use."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such container, or one without a limit
            sizes.append(int(Path(limit).read_text(encoding="ascii")))
    return min(sizes)


def _middle(run: Callable[[], object], times: int = _TIMES) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[times // 2]
