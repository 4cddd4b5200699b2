"""Reading a file past the system's page cache, into buffers that are counted.

With O_DIRECT the disk writes straight into the buffer; places, lengths and addresses are multiples of a page.
Where the file system has none, pages are read as always and given back at once (posix_fadvise, DONTNEED).
"""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from ...compiler.ir.regular import open_regular
from ...errors import ArtifactError, disk_error

Bytes = npt.NDArray[np.uint8]

#: What O_DIRECT wants of places, lengths and addresses; no disk in use asks for more.
PAGE = 4096

#: Bytes of a read when a file is read through once.
PIECE = 8 << 20


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
        self._descriptor = open_regular(path.resolve())
        self._found = self._state()
        self.size = self._found[0]
        self.direct = direct and self._try_direct()

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
        try:
            return os.preadv(self._descriptor, [view], place)
        except OSError as error:
            if (
                error.errno == errno.EINVAL and self.direct
            ):  # a file system that takes the flag and not the read
                self._set_direct(False)
                return self._read_at(view, place)
            raise disk_error(error.errno or errno.EIO, self.path) from error

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


def direct_hash(path: Path) -> str:
    """The BLAKE3 hash of a file, in hex; what was read is not left in memory."""
    digest, buffer, file = blake3(max_threads=blake3.AUTO), aligned(PIECE), DirectFile(path)
    try:
        for place in range(0, file.size, PIECE):
            digest.update(file.read(place, min(PIECE, file.size - place), buffer).data)
    finally:
        with suppress(OSError):
            file.close()
    return digest.hexdigest()


def _up(size: int) -> int:
    return -(-size // PAGE) * PAGE
