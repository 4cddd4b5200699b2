"""The BLAKE3 hash of a file, by all processors: the one place that hashes with threads."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

from .forks import forked


def file_hash(path: Path) -> str:
    """In hex. The file is mapped, not read into memory."""
    digest = blake3(max_threads=1 if forked() else blake3.AUTO)
    digest.update_mmap(path)
    return digest.hexdigest()
