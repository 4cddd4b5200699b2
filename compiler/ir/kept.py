"""The user's cache folder: what einfold derived or measured once and would derive or measure again.

A file there is used only as it was written: it ends in a line with the hash of the rest, and is read through
no link and from nothing but a regular file. What is damaged is made again, and what cannot be written costs
time alone.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import IO, Any

from blake3 import blake3

from ...errors import DiskError, pass_on, recognise

#: Bytes of the largest file of JSON that is read.
_JSON = 1 << 24

#: Bytes of the largest file of tensors that is read.
_TENSORS = 1 << 34

#: The last line of a file.
_SEAL = re.compile(rb"\neinfold ([0-9a-f]{64})\n")
_SEAL_BYTES = len(b"\neinfold \n") + 64

#: Seconds after which a file that is half written is nobody's any more.
_STALE = 3600


def cache_home() -> Path:
    """The folder: `EINFOLD_CACHE`, or `einfold` in the user's cache folder.

    For a user without a home, as in some containers, it is one that cannot be: nothing is found or kept.
    """
    named = os.environ.get("EINFOLD_CACHE")
    if named:
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "einfold"
    except RuntimeError:
        return Path(os.devnull) / "einfold"


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> bool:
    """Writes a file of the cache whole or not at all; gives whether it could be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError:
        return False
    try:
        with os.fdopen(handle, "wb") as file:
            sealed = _Sealed(file)
            fill(sealed)  # type: ignore[arg-type]  # it has what torch.save and json ask for
            file.write(b"\neinfold %s\n" % sealed.digest.hexdigest().encode())
        os.replace(name, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError) or isinstance(recognise(error), DiskError):
            return False
        raise
    return True


def read(path: Path, limit: int) -> bytes | None:
    """What was written to a file of the cache; None where there is none, or not as it was written."""
    try:
        with open(path, "rb", opener=_open_plainly) as file:
            about = os.fstat(file.fileno())
            length = about.st_size - _SEAL_BYTES
            if not stat.S_ISREG(about.st_mode) or not 0 <= length <= limit:
                return None
            file.seek(length)
            seal = _SEAL.fullmatch(file.read())
            if seal is None:
                return None
            file.seek(0)
            data = file.read(length)
    except (OSError, ValueError):  # a name with a NUL is the second
        return None
    return data if blake3(data).hexdigest().encode() == seal.group(1) else None


def _open_plainly(path: str, flags: int) -> int:
    """Through no link, and without waiting for a pipe's other end."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def write_json(path: Path, data: Mapping[str, Any]) -> bool:
    """Writes a file of the cache whole or not at all; gives whether it could be written."""
    text = json.dumps(data, allow_nan=False).encode()
    return write(path, lambda file: file.write(text))


def read_json(path: Path) -> dict[str, Any] | None:
    """The table that `write_json` wrote; None where there is none, or not as it was written."""
    raw = read(path, _JSON)
    try:
        data = None if raw is None else json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def write_tensors(path: Path, data: Any) -> bool:
    """Writes tensors, and tables of such, whole or not at all; gives whether they could be written."""
    import torch

    return write(path, lambda file: torch.save(data, file))


def read_tensors(path: Path) -> Any:
    """What `write_tensors` wrote; None where there is none, or not as it was written."""
    import torch

    raw = read(path, _TENSORS)
    try:
        return None if raw is None else torch.load(io.BytesIO(raw), weights_only=True)
    except Exception as error:  # of another version of torch, which raises many unrelated classes
        pass_on(error)
        return None


def drop_oldest(folders: Iterable[Path], kept: int) -> None:
    """Removes folders but for the newest so many, where they may be removed."""
    with suppress(OSError):
        newest = sorted(folders, key=lambda each: each.stat().st_mtime, reverse=True)
        for old in newest[kept:]:
            shutil.rmtree(old, ignore_errors=True)


class _Sealed:
    """A file that is hashed while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = blake3()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _clear_stale(path: Path) -> None:
    """Removes what a killed process left of the same file."""
    for left in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > _STALE:
                left.unlink()
