"""Writing an artifact: in a temporary folder beside the output, renamed when it is whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from blake3 import blake3

from ..errors import DiskError, OutputError
from .ir.manifest import GRAPH, MODEL, NAME, WEIGHTS, FileEntry

#: What `export_onnx` writes of a module.
_EXPORT = {MODEL, WEIGHTS, GRAPH}


def check_output(out: Path, force: bool) -> None:
    """Refuses an output that exists (without `force`), or that cannot be written.

    `force` replaces an artifact, an exported module or an empty folder, and nothing else: a folder of
    another kind is never deleted.
    """
    clear_leftovers(out)
    _check_replaceable(out, force)
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"{parent} is a file; {out} needs a folder there")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {parent} cannot be written")


def _check_replaceable(out: Path, force: bool) -> None:
    if out.is_symlink() or out.exists():
        replaceable = (
            out.is_dir()
            and not out.is_symlink()
            and (
                (out / NAME).is_file() or {path.name for path in out.iterdir()} in (set(), _EXPORT)
            )
        )
        if not force:
            raise OutputError(
                f"{out} exists already; choose another output, or replace it with --force"
            )
        if not replaceable:
            raise OutputError(
                f"{out} is no einfold artifact, so --force does not replace it; remove it yourself"
            )
        if Path.cwd().is_relative_to(out.resolve()):
            raise OutputError(
                f"{out} holds the current folder, which cannot be replaced; go elsewhere first"
            )


def check_dump(dump: Path, out: Path) -> None:
    """Makes the folder for dumps; refuses one that cannot be made, or that the output would replace."""
    if dump.resolve().is_relative_to(out.resolve()):
        raise OutputError(
            f"the dump folder {dump} lies in the output {out}, which is put in place as a whole; "
            "choose one outside it"
        )
    try:
        dump.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the dump folder {dump}: {error.strerror}") from error


def clear_leftovers(out: Path) -> None:
    """Removes what a killed compile left beside `out`; puts back what it was about to replace."""
    name = out.resolve().name
    for stale in sorted(out.resolve().parent.glob(f".{escape(name)}.einfold-*")):
        number, _, kind = stale.name.removeprefix(f".{name}.einfold-").partition("-")
        if not number.isdigit() or kind not in ("", "old") or _alive(int(number)):
            continue  # somebody's own, or a compile that still runs
        if kind == "old" and not out.exists():
            stale.rename(out)
        else:
            shutil.rmtree(stale, ignore_errors=True)


@contextmanager
def staged(out: Path, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and goes when it does not."""
    check_output(out, force)
    staging = out.resolve().parent / f".{out.resolve().name}.einfold-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    made = [folder for folder in staging.parents if not folder.exists()]
    try:
        try:
            staging.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"cannot write to {staging.parent}: {error.strerror}") from error
        yield staging
        _check_replaceable(out, force)  # again: somebody may have put something there meanwhile
        _swap(staging, out)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # something else may have been put there meanwhile
                folder.rmdir()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(
                f"the disk is full: {out} could not be written; nothing was left behind"
            ) from error
        if isinstance(error, OSError) and error.errno in _UNWRITABLE and _about(error, staging):
            raise OutputError(f"cannot write {out}: {error.strerror}") from error
        raise


_UNWRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.EFBIG, errno.EIO)


def _about(error: OSError, folder: Path) -> bool:
    """Whether an error concerns a folder, or names no file; the model that is read may fail as well."""
    return error.filename is None or str(error.filename).startswith(str(folder))


def _swap(staging: Path, out: Path) -> None:
    if not out.exists():
        staging.rename(out)
        return
    old = staging.with_name(staging.name + "-old")
    out.rename(old)
    try:
        staging.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def file_entry(path: Path, known_hash: str | None = None) -> FileEntry:
    """Size and hash of a written file."""
    if known_hash is None:
        digest = blake3()
        digest.update_mmap(path)
        known_hash = digest.hexdigest()
    return FileEntry(bytes=path.stat().st_size, blake3=known_hash)
