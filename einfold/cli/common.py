"""What the verbs share: consoles, progress, JSON, errors as sentences."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..errors import (
    ArtifactWarning,
    EinfoldError,
    OutputError,
    RecipeError,
    pass_on,
    recognise,
)

#: Results go to stdout, everything said on the way to stderr.
#: Neither reads markup: paths and names of models may hold brackets.


class _Plain(Console):
    """Prints texts as `printable` gives them."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(o) if isinstance(o, str) else o for o in objects), **options)


out = _Plain(highlight=False, soft_wrap=True, markup=False)
err = _Plain(stderr=True, highlight=False, soft_wrap=True, markup=False)


def printable(text: str) -> str:
    """The text with codes that a terminal would obey written out: names of models and files are anybody's."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


Tell = Callable[[str, float], None]

#: Seconds between two lines of progress, where there is no terminal for a bar.
_BETWEEN = 30

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """What is written to a file that is then there whole, or not at all; to a pipe or a device as it comes.
    Raises OutputError where it cannot be."""
    try:
        target = Path(os.path.realpath(path))  # a link stays one
        if target.exists() and not target.is_file():
            with target.open("wb") as stream:
                yield stream
            return
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name[:64]}.", suffix=".tmp"
        )
        try:
            with os.fdopen(handle, "wb") as stream:
                yield stream
            os.chmod(name, target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
            os.replace(name, target)
        finally:
            with suppress(OSError):
                os.unlink(name)
    except OSError as error:
        pass_on(error)
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _umask() -> int:
    found = os.umask(0o077)
    os.umask(found)
    return found


def print_json(data: Any) -> None:
    """One JSON document on stdout, and nothing else."""
    readable = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=not readable) + "\n")


@contextmanager
def progress(quiet: bool = False) -> Iterator[Tell]:
    """A bar on stderr for work whose share is told, or a line of it every half a minute where stderr is no
    terminal; nothing on `quiet`."""
    if quiet:
        yield lambda text, share: None
        return
    # Not what the console says, which FORCE_COLOR has say yes of a file or a pipe too.
    if not sys.stderr.isatty():
        yield _by_lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bars:
        task = bars.add_task("starting", total=1.0)
        yield lambda text, share: bars.update(task, description=text, completed=share)


def _by_lines() -> Tell:
    """Tells on stderr how far work has come, every half a minute: short work is done by then."""
    begun = told = time.monotonic()

    def tell(text: str, share: float) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= _BETWEEN:
            told = now
            minutes, seconds = divmod(int(now - begun), 60)
            err.print(f"{share:4.0%} after {minutes}:{seconds:02}: {text}")

    return tell


def explain_error(error: Exception, as_json: bool) -> int:
    """Prints an error as one sentence; gives the exit code."""
    known = recognise(error)
    if isinstance(known, EinfoldError):
        error = known
    if isinstance(error, EinfoldError):
        text, code = str(error), error.exit_code
    elif isinstance(error, OSError) and error.errno == errno.EBADF:
        text, code = "stdout is closed, so there is nowhere to write the result to", 74
    elif isinstance(error, OSError) and error.filename and error.strerror:
        text, code = f"{error.filename}: {error.strerror}", 74
    elif isinstance(error, ModuleNotFoundError):
        text, code = (
            f"the package {error.name!r} is needed for this; "
            "install einfold with its extra, such as einfold[onnx]",
            11,
        )
    else:
        text, code = (
            f"internal error: {type(error).__name__}: {error} "
            "(run again with --debug for the traceback, and report it)",
            70,
        )
    err.print(Text.assemble(("error:", "bold red"), " ", printable(text)))
    if as_json:
        with suppress(OSError):  # stdout itself may be what failed
            print_json({"error": text, "kind": type(error).__name__})
    return code


def show_warnings() -> None:
    """einfold's own warnings as sentences on stderr; those of libraries as they come."""
    plain = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, ArtifactWarning):
            err.print(Text.assemble(("warning:", "bold yellow"), " ", printable(str(message))))
        else:
            plain(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    warnings.simplefilter("always", ArtifactWarning)


def parse_bytes(text: str) -> int:
    """`4GB` (10^9), `4GiB` (2^30), `800M` or a plain number of bytes. Raises RecipeError otherwise."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if found is None:
        raise RecipeError(f"{text!r} is no size; write it like 4GB, 4GiB or 800M")
    size = float(found.group(1)) * _UNITS[found.group(2) or ""]
    if not size < 1 << 63:
        raise RecipeError(
            f"{text[:40]!r} is more than a machine can have; write it like 4GB or 4GiB"
        )
    return int(size)
