"""Hashes of files that this process has found, so that a file is hashed once though several ask.

A hash counts for a file whose device, number, size and times of its contents (mtime) and of its entry (ctime,
which nobody can set) are as they were before it was read. A file that was written so shortly before that a
later write could show the same times is hashed again: one through a mapping whose page is not written back
yet changes none. What is damaged on a disk behind all this is found by the next process, and so is what is
written through a mapping where pages are never written back (tmpfs).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

#: Nanoseconds within which two writes may have the same time: Linux writes pages back within half a minute.
_BLUR = 35_000_000_000

#: Files that are known at most.
_MOST = 256

State = tuple[int, int, int, int, int]

_found: dict[State, Future[str]] = {}


def hashed_once(path: Path, hash_of: Callable[[Path], str]) -> str:
    """The hash of a file by `hash_of`, or as it was found before, or by another thread that is at it."""
    state, own = state_of(path), Future[str]()
    digest, kept = "", False
    try:
        while (known := _found.setdefault(state, own)) is not own:
            found = known.result()
            if found:
                return found
        digest = hash_of(path)
        young = time.time_ns() - max(state[3:]) < _BLUR
        kept = not young and state_of(path) == state and len(_found) <= _MOST
    finally:
        if not kept and _found.get(state) is own:
            del _found[state]
        own.set_result(digest)  # "" where it failed: who waits tries for himself
    return digest


def state_of(path: Path) -> State:
    """What tells that a file is the one that it was: device, number, size and times."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


# A child of a fork would wait for threads that it has not.
os.register_at_fork(after_in_child=_found.clear)
