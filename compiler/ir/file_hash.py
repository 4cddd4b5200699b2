"""The BLAKE3 hash of a file, by all processors: the one place that hashes with threads."""

from __future__ import annotations

import os
from pathlib import Path

from blake3 import blake3

#: Threads of BLAKE3's pool. They are not in a forked child, which would wait for them for ever.
_threads = blake3.AUTO


def file_hash(path: Path) -> str:
    """In hex. The file is mapped, not read into memory."""
    digest = blake3(max_threads=_threads)
    digest.update_mmap(path)
    return digest.hexdigest()


def _alone() -> None:
    global _threads
    _threads = 1


os.register_at_fork(after_in_child=_alone)
