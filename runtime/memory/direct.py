"""Reading a file past the system's page cache, into buffers that are counted.

With O_DIRECT the disk writes straight into the buffer; places, lengths and addresses are multiples of a page.
Where the file system has none, pages are read as always and given back at once (posix_fadvise, DONTNEED).
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from ...compiler.ir.regular import open_regular
from ...errors import ArtifactError, DiskError

T = TypeVar("T")

Bytes = npt.NDArray[np.uint8]

#: What O_DIRECT wants of places, lengths and addresses; no disk in use asks for more.
PAGE = 4096

#: Bytes of a read when a file is read through once.
PIECE = 8 << 20

#: Reads that the disk has at once: one alone leaves many disks half idle.
READERS = 3

#: Bytes of each of them while a file is hashed, in so many buffers.
_HASHED, _BUFFERS = 2 << 20, READERS + 1

#: Seconds before what could not be read is read once more.
_PAUSE = 0.05


def aligned(size: int) -> Bytes:
    """Zeroed memory that begins at a page and goes back to the system when it is let go."""
    return np.frombuffer(mmap.mmap(-1, max(_up(size), PAGE)), np.uint8)


def room(offset: int, length: int) -> int:
    """Bytes of a buffer that extent can be read into, whole pages as it lies in the file."""
    return _up(offset + length) - offset // PAGE * PAGE


class DirectFile:
    """A file that is read by place; counts its bytes."""

    def __init__(self, path: Path, direct: bool = True) -> None:
        """Without `direct`, or where the system has no such reads, pages are given back behind each read."""
        self.path = path
        self.bytes_read = 0
        self._descriptor = self._open()
        self._found = self._state()
        self.size = self._found[0]
        self.direct = direct and self._try_direct()

    def _open(self) -> int:
        return open_regular(self.path.resolve())

    def read(self, offset: int, length: int, buffer: Bytes) -> Bytes:
        """The bytes at a place, as a view of the buffer, which has `room` for them.

        Raises ArtifactError where the file ends before, DiskError where the disk fails.
        """
        start = offset // PAGE * PAGE
        wanted = offset + length - start
        view, done = memoryview(buffer.data)[: _up(wanted)], 0
        while done < wanted:
            got = self._read_at(view[done:], start + done)
            done += got
            if done < wanted:  # a read that ends early goes on at a page
                done -= done % PAGE
                if got < PAGE or start + done + PAGE > os.fstat(self._descriptor).st_size:
                    self._too_short(offset, length)
        self.bytes_read += wanted
        if not self.direct:
            self._let_go(start, wanted)
        return buffer[offset - start : offset - start + length]

    def _too_short(self, offset: int, length: int) -> None:
        raise ArtifactError(
            f"{self.path} ends before the {length:,} bytes at {offset:,} that are wanted: it was cut short "
            "after it was opened; bring the artifact back as it was, or compile it again"
        )

    def check(self) -> None:
        """Raises ArtifactError where the file was written to, or cut short, after it was opened."""
        if self._state() != self._found:
            raise ArtifactError(
                f"{self.path} was changed after it was opened: bring the artifact back as it was, and load "
                "it again"
            )

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns

    def _read_at(self, view: memoryview, place: int) -> int:
        def read() -> int:
            try:
                return os.preadv(self._descriptor, [view], place)
            except OSError as error:
                if error.errno == errno.EINVAL and self.direct:
                    self._set_direct(False)  # a file system that takes the flag and not the read
                raise

        return twice(read, self.path, place, len(view))

    def _let_go(self, start: int, length: int) -> None:
        advise: Any = getattr(os, "posix_fadvise", None)
        if advise is not None:
            advise(self._descriptor, start, length, os.POSIX_FADV_DONTNEED)

    def _try_direct(self) -> bool:
        if not hasattr(os, "O_DIRECT"):
            return False
        try:
            self._set_direct(True)
        except OSError:  # such as tmpfs before Linux 6.6
            return False
        return self.direct

    def _set_direct(self, on: bool) -> None:
        import fcntl

        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        direct = os.O_DIRECT
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | direct if on else flags & ~direct)
        self.direct = on


def twice(read: Callable[[], T], path: Path, place: int, length: int) -> T:
    """What `read` gives of a place in a file. Where it fails it is tried once more, as some errors pass.

    Raises DiskError where it fails again.
    """
    with suppress(OSError):
        return read()
    time.sleep(_PAUSE)
    try:
        return read()
    except OSError as error:
        number = errno.EIO if error.errno in (errno.EFAULT, None) else error.errno
        raise DiskError(
            f"{path}: {os.strerror(number)}, twice, where {length:,} bytes at {place:,} were to be read; see "
            "to the disk"
        ) from error


def direct_hash(path: Path) -> str:
    """The BLAKE3 hash of a file, in hex; what was read is not left in memory."""
    with closing(DirectFile(path)) as file:
        return direct_hashes(file, [(0, file.size)])[0]


def direct_hashes(
    file: DirectFile, stretches: Sequence[tuple[int, int]], stop: Event | None = None
) -> list[str]:
    """The BLAKE3 hashes, in hex, of stretches of a file from a place to another; none where it was told to
    `stop`. A few threads read, this one hashes; 8 MiB are held meanwhile."""
    digests = [blake3() for _ in stretches]
    parts = [
        (index, place, min(_HASHED, end - place))
        for index, (start, end) in enumerate(stretches)
        for place in range(start, end, _HASHED)
    ]
    free = [aligned(_HASHED + PAGE) for _ in range(_BUFFERS)]

    def read(place: int, length: int, buffer: Bytes) -> tuple[Bytes, Bytes]:
        return buffer, file.read(place, length, buffer)

    with ThreadPoolExecutor(READERS, "einfold-hash") as pool:
        waiting: deque[tuple[int, Future[tuple[Bytes, Bytes]]]] = deque()
        for index, place, length in parts:
            if stop is not None and stop.is_set():
                return []
            if not free:
                free.append(_hash_next(waiting, digests))
            waiting.append((index, pool.submit(read, place, length, free.pop())))
        while waiting:
            _hash_next(waiting, digests)
    return [digest.hexdigest() for digest in digests]


def _hash_next(
    waiting: deque[tuple[int, Future[tuple[Bytes, Bytes]]]], digests: list[Any]
) -> Bytes:
    """Hashes what was asked for first, and gives its buffer."""
    index, read = waiting.popleft()
    buffer, view = read.result()
    digests[index].update(view.data)
    return buffer


def _up(size: int) -> int:
    return -(-size // PAGE) * PAGE
