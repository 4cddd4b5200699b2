"""A file without a name, which slots of a cache are written to and read from, past the system's page cache.

No folder lists it (O_TMPFILE, or unlinked as soon as it is made), so the system takes it back when the
process ends, however that ends. Its room is taken before anything is written, so that a full disk is told
before a prompt is read.
"""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from ...errors import DiskError, disk_error
from .direct import PAGE, Bytes, DirectFile
from .filesystem import held_in_memory

#: How the file is called in messages, in the folder that it lies in.
_NAME = "spilled-cache"


class SpillFile(DirectFile):
    """Places are bytes from its start, of whole pages."""

    def __init__(self, folder: Path, direct: bool = True) -> None:
        """Raises DiskError where the folder takes no file, or lies in memory."""
        super().__init__(folder / _NAME, direct)

    def take(self, nbytes: int) -> int:
        """The place of room for so many bytes. Raises DiskError where the disk has not as much."""
        place, length = self.size, -(-nbytes // PAGE) * PAGE
        try:
            os.posix_fallocate(self._descriptor, place, length)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise disk_error(error.errno or errno.EIO, self.path) from error
            raise DiskError(
                f"the disk is full: {self.path.parent} has no room for {length:,} more bytes of the cache; "
                "free some, or set EINFOLD_CACHE to a folder on another disk"
            ) from error
        self.size += length
        return place

    def write(self, place: int, view: Bytes) -> None:
        """Writes whole pages that lie at a page in memory. Raises DiskError where the disk takes them not."""
        rest, done = memoryview(view.data), 0
        while done < len(rest):
            try:
                wrote = os.pwritev(self._descriptor, [rest[done:]], place + done)
            except OSError as error:
                if error.errno == errno.EINVAL and self.direct:
                    self._set_direct(False)  # a file system that takes the flag and not the write
                    continue
                raise disk_error(error.errno or errno.EIO, self.path) from error
            done += wrote - wrote % PAGE
            if wrote < PAGE:
                raise disk_error(errno.ENOSPC, self.path)
        if not self.direct:
            os.fdatasync(self._descriptor)  # what is not on the disk yet stays in memory
            self._let_go(place, done)

    def _open(self) -> int:
        return _nameless(self.path.parent)

    def _too_short(self, offset: int, length: int) -> None:
        raise DiskError(
            f"{self.path} ends before the {length:,} bytes at {offset:,} that are wanted: the file that "
            "holds a part of the cache was cut short; start the text again"
        )

    def __del__(self) -> None:
        with suppress(Exception):  # half made, or the interpreter ends
            self.close()


def no_spilling(folder: Path) -> str:
    """Why nothing of a cache can lie in a file in a folder; "" where it can."""
    if not hasattr(os, "posix_fallocate") or not hasattr(os, "preadv"):
        return "this system has no files that are read and written by place"
    memory = held_in_memory(folder)
    if memory:
        return f"{folder} is on {memory}, which is held in memory; set EINFOLD_CACHE to a folder on a disk"
    return ""


def free_bytes(folder: Path) -> int:
    """What the disk of a folder has room for, which need not be there yet; a large number where the system
    does not say."""
    for path in (folder, *folder.absolute().parents):
        with suppress(OSError):
            found = os.statvfs(path)
            return found.f_bavail * found.f_frsize
    return 1 << 62


def _nameless(folder: Path) -> int:
    """A descriptor of a new file that no folder lists."""
    reason = no_spilling(folder)
    if reason:
        raise DiskError(f"the cache cannot be spilled: {reason}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | getattr(os, "O_TMPFILE", 0)
        with suppress(OSError):  # a file system that has no such files
            if flags != os.O_RDWR:
                return os.open(folder, flags | os.O_CLOEXEC, 0o600)
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=f".{_NAME}-")
        os.unlink(name)
    except OSError as error:
        raise DiskError(
            f"{folder}: {error.strerror}; the cache cannot be spilled there, set EINFOLD_CACHE to another "
            "folder"
        ) from error
    return descriptor
