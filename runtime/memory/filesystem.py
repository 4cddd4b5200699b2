"""Which file systems are held in memory: what lies there takes as much memory as it has bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

#: Linux's names of file systems whose files are memory, and of block devices that are.
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs", "rootfs")
_DEVICES = ("ram", "zram")

#: Where Linux says what is mounted, and which device a number is.
_MOUNTS, _BLOCKS = Path("/proc/self/mountinfo"), Path("/sys/dev/block")


def held_in_memory(folder: Path) -> str:
    """The file system that a folder lies on, or will, where that is held in memory, such as "tmpfs"; "" else.

    It is found by its device's number in the table of mounts. "" also where the system has no such table, and
    for layers over such a file system (overlayfs, FUSE, a loop device), which do not say what is beneath.
    """
    for path in (folder, *folder.absolute().parents):
        with suppress(OSError, ValueError):
            return _of_device(os.stat(path).st_dev)
    return ""


def _of_device(device: int) -> str:
    number = f"{os.major(device)}:{os.minor(device)}"
    kinds = [kind for found, kind in _mounts() if found == number]
    if kinds and kinds[-1] in _IN_MEMORY:
        return kinds[-1]
    name = ""
    with suppress(OSError):  # a file system of its own number, such as btrfs
        name = (_BLOCKS / number).resolve(strict=True).name
    return name if name.rstrip("0123456789") in _DEVICES else ""


def _mounts() -> Iterator[tuple[str, str]]:
    """Of each mount the number of its device, as `major:minor`, and the name of its file system."""
    with suppress(OSError), open(_MOUNTS, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            place, _, kind = line.partition(" - ")
            yield place.split()[2], kind.split()[0]
