"""Writing an artifact: in a temporary folder beside the output, renamed when it is whole."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path

from ..errors import DiskError, OutputError, pass_on
from .ir.file_hash import file_hash
from .ir.locks import lock
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
    for found in sorted(out.resolve().parent.glob(f".{escape(name)}.einfold-*")):
        mark, _, kind = found.name.removeprefix(f".{name}.einfold-").partition("-")
        if not _MARK.fullmatch(mark) or kind not in ("", "old", "lock"):
            continue  # somebody's own
        with suppress(OSError), lock(_lock_of(out, mark)) as dead:  # what cannot be cleared is left
            if not dead or kind == "lock" or not found.is_dir():
                continue  # a compile that still runs; a lock goes as it came
            if kind == "old" and not out.exists():
                found.rename(out)
            else:
                shutil.rmtree(found, ignore_errors=True)


#: Tells the folders of two compiles of one output apart. (Older versions put their process id there.)
_MARK = re.compile(r"[0-9a-f]{16}|\d{1,10}")


def _lock_of(out: Path, mark: str) -> Path:
    return out.resolve().parent / f".{out.resolve().name}.einfold-{mark}-lock"


@contextmanager
def staged(out: Path, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and goes when it does not.

    Compiles of one output in two threads, processes or containers have folders of their own, and the one that
    ends last has the last word.
    """
    check_output(out, force)
    mark = secrets.token_hex(8)
    staging = out.resolve().parent / f".{out.resolve().name}.einfold-{mark}"
    made = [folder for folder in staging.parents if not folder.exists()]
    try:
        with _own(staging, _lock_of(out, mark)):
            yield staging
            with lock(_lock_of(out, "0"), wait=True):
                _check_replaceable(out, force)  # again: there may be something by now
                _swap(staging, out)
    except BaseException as error:
        for folder in made:
            with suppress(OSError):  # something else may have been put there meanwhile
                folder.rmdir()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(
                f"the disk is full: {out} could not be written; nothing was left behind"
            ) from error
        if isinstance(error, OSError) and error.errno in _UNWRITABLE and _about(error, staging):
            kind = DiskError if error.errno == errno.EIO else OutputError
            raise kind(f"cannot write {out}: {error.strerror}") from error
        pass_on(error)
        raise


@contextmanager
def _own(staging: Path, locked: Path) -> Iterator[None]:
    """A folder under a lock that says that somebody works in it; both go at the end, whatever that is."""
    with ExitStack() as stack:
        try:
            staging.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(locked))
            stack.callback(shutil.rmtree, staging, ignore_errors=True)
            staging.mkdir()
        except OSError as error:
            raise OutputError(f"cannot write to {staging.parent}: {error.strerror}") from error
        yield


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


def file_entry(path: Path, known_hash: str | None = None) -> FileEntry:
    """Size and hash of a written file."""
    return FileEntry(bytes=path.stat().st_size, blake3=known_hash or file_hash(path))
