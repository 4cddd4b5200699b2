"""Reading files that may be anything: only regular ones are opened, and so many bytes read at the most."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ...errors import ArtifactError, pass_on

#: The most bytes of a graph, a tokenizer or a model without its weights that are read into memory.
LARGEST = 1 << 28


def open_regular(path: Path) -> int:
    """A descriptor to read `path` by. Opening waits for nobody, and follows no link in the last place.

    Raises ArtifactError for a folder, a link, a pipe, a socket or a device, and where it cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ArtifactError(f"{path} is no regular file")
        descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        pass_on(error)
        raise ArtifactError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # changed meanwhile
        os.close(descriptor)
        raise ArtifactError(f"{path} is no regular file")
    return descriptor


def read_regular(path: Path, limit: int = LARGEST) -> bytes:
    """The bytes of a regular file; raises ArtifactError where it is none, or holds more than `limit`."""
    with os.fdopen(open_regular(path), "rb") as stream:
        try:
            found = stream.read(limit + 1)
        except OSError as error:
            pass_on(error)
            raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    if len(found) > limit:
        raise ArtifactError(f"{path} holds more than the {limit:,} bytes that it may")
    return found
