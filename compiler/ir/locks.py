"""A lock on a file: held by one thread of one process, wherever the others run, until it ends.

The system lets go of it when its holder is killed. A process id says less: each container counts its own,
and the threads of a process share one.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: What a file system without locks says; then nothing holds two processes apart, as nothing can.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Holds the lock of the file `path`, which is made and goes again; gives whether it is held.

    Without `wait` it is not where another holds it. Raises OSError where the file cannot be made.
    """
    handle = _take(path, wait)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            with suppress(OSError):
                path.unlink()
            os.close(handle)


def _take(path: Path, wait: bool) -> int | None:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return handle
            os.close(handle)
            raise
        except BaseException:  # interrupted while it waited
            os.close(handle)
            raise
        if _still_there(path, handle):
            return handle
        os.close(handle)  # its last holder removed it meanwhile: another one is the lock now


def _still_there(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
