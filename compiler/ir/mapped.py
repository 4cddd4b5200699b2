"""Files that weights are mapped from: their pages go when memory is given back, and are read again.

What was read of a mapping stays among the memory of a process until the system lacks room, which is as much
as the checkpoint in the end. So whoever maps a checkpoint names its files here, and wherever memory is given
back, so are these pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_files: set[bytes] = set()


def read_again(files: Iterable[Path]) -> None:
    """Lets pages of these files go from now on, where this process has mapped them and wrote to none."""
    if sys.platform.startswith("linux"):
        _files.update(os.fsencode(file.resolve()) for file in files)


def let_go() -> None:
    """Gives back the pages that are there of such files; the system's cache may keep them."""
    if not _files:
        return
    libc = ctypes.CDLL(None)
    with suppress(OSError):
        for first, last in _untouched():
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _untouched() -> list[tuple[int, int]]:
    """The mappings of such files whose pages are all the file's. One that was written to has pages of its
    own, which nothing could bring back."""
    found: list[tuple[int, int]] = []
    ours = False
    with open("/proc/self/smaps", "rb") as stream:
        for line in stream:
            words = line.split(None, 5)
            # The head of a mapping: addresses, rights, .., the file
            if not words[0].endswith(b":"):
                ours = len(words) == 6 and words[5].rstrip(b"\n") in _files
                if ours:
                    first, last = (int(each, 16) for each in words[0].split(b"-"))
                    found.append((first, last))
            elif ours and words[0] == b"Anonymous:" and words[1] != b"0":
                found.pop()
                ours = False
    return found
