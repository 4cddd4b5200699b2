"""One tree of exceptions. Each message says what, where, what was expected and what to do.

The command line prints the message and ends with the class's `exit_code`; a traceback is shown
only with ``--debug``. Codes and their meaning: docs/exit-codes.md.

What is caught to be told in a sentence of ours goes through `pass_on` first: an interrupt, want of
memory and a disk that refuses are none of the model's, the artifact's or the recipe's faults, however
deep in a library they were met.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from types import FrameType


class EinfoldError(Exception):
    """Root of everything that einfold raises on purpose."""

    exit_code = 1


class ModelError(EinfoldError):
    """The model folder, its config or its weights cannot be used as they are."""

    exit_code = 3


class UnsupportedError(EinfoldError):
    """Well-formed input that einfold has no lowering for; names the layer and the reason."""

    exit_code = 4


class ArtifactError(EinfoldError):
    """An artifact is damaged, of a newer format, or would leave its folder."""

    exit_code = 5


class OutputError(EinfoldError):
    """The output exists, cannot be written, or the disk is full."""

    exit_code = 6


class RecipeError(EinfoldError):
    """A recipe or an option has an unknown key or an impossible value."""

    exit_code = 7


class PromptError(EinfoldError):
    """The prompt does not fit: too long for the context, or a token id out of range."""

    exit_code = 8


class IRError(EinfoldError):
    """The graph breaks a rule of the IR, or its textual form does not parse."""

    exit_code = 9


class CalibrationError(EinfoldError):
    """The calibration text is missing or too short, or the model gives no finite numbers on it."""

    exit_code = 10


class NotFiniteError(EinfoldError):
    """A step of a compiled model gives numbers that are none; names the step."""

    exit_code = 13


class OutOfMemoryError(EinfoldError, MemoryError):
    """The system gives no more memory."""

    exit_code = 12


class DiskError(EinfoldError, OSError):
    """The system refuses a file: the disk is full or fails, or the file may not be read or written."""

    exit_code = 74


class ArtifactWarning(UserWarning):
    """Something that an artifact brings is passed over; says what and why."""


#: How torch (pybind11) begins the text of what it made of a stop.
_STOP_TEXT = re.compile(r"(KeyboardInterrupt|SystemExit)\b")

#: How libraries spell want of memory in exceptions of other classes.
_MEMORY_TEXT = re.compile(
    r"bad_alloc|bad allocation|[Cc]an't allocate memory|[Cc]annot allocate memory|DefaultCPUAllocator"
    r"|Failed to allocate memory|out of memory\b|\bMemoryError\b|Unable to allocate \d"
    r"|failed to map segment from shared object|can't start new thread"  # a library, a thread's stack
)

#: What the system says where a file is refused, whatever is in it.
_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EFBIG,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
)

#: How libraries in Rust and C++ spell an error of the system.
_DISK_TEXT = re.compile(r"os error (\d+)\b|Os \{ code: (\d+)\b|\b[Ee]rrno:? ?(\d+)\b")
_DISK_WORDS = re.compile("|".join(re.escape(os.strerror(n)) for n in _DISK if n != errno.EPERM))

#: How torch and numpy say that less was written than should be; the number is lost on the way.
_SHORT_WRITE = re.compile(r"PytorchStreamWriter failed|file write failed|requested and \d+ written")


def pass_on(error: BaseException) -> None:
    """Raises what `error` really is where it is an interrupt, want of memory or a refusal of the disk.

    To be called first wherever an exception of unknown class is caught to be renamed or passed over. Looks
    through causes and contexts, and knows the forms into which torch, numpy, onnxruntime, safetensors and
    tokenizers bring them. Raises KeyboardInterrupt, SystemExit, GeneratorExit, OutOfMemoryError or
    DiskError; gives nothing back for any other error.
    """
    known = recognise(error)
    if known is None:
        return
    if known.__traceback__ is None:  # made here
        raise known from error
    raise known


def stop_on(error: BaseException) -> None:
    """Raises the interrupt that `error` really is. For what is tried, and done without where it fails."""
    known = recognise(error)
    if known is not None and not isinstance(known, EinfoldError):
        raise known from None


def recognise(error: BaseException) -> BaseException | None:
    """The error that `pass_on` would raise, or None."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, (KeyboardInterrupt, SystemExit, OutOfMemoryError, DiskError)):
            return link
    if isinstance(error, GeneratorExit):  # of another generator it says nothing
        return error
    if isinstance(error, EinfoldError):
        return None  # a sentence of ours that quotes another error is not that error
    for link in chain:
        found = _recognise(link, link is error)
        if found is not None:
            return found
    return None


def first_line(error: BaseException) -> str:
    """The first line of another library's error, to be quoted in a sentence of ours."""
    text = str(error).strip()
    return text.splitlines()[0].strip() if text else type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, then what it came from; not what the caller was handling before all of it."""
    seen: set[int] = set()
    frames = _frames()
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop(0)
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        if link is not error and _caught_by(link, frames):
            continue
        yield link
        inner = getattr(link, "inner_exception", None)  # of torch's compilers
        waiting.append(inner if isinstance(inner, BaseException) else None)
        waiting.append(link.__cause__)
        waiting.append(None if link.__suppress_context__ else link.__context__)


def _frames() -> set[FrameType]:
    """Frames that still run, above the one that asks `pass_on`."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    found = set()
    frame = frame.f_back if frame is not None else None
    while frame is not None:
        found.add(frame)
        frame = frame.f_back
    return found


def _caught_by(error: BaseException, frames: set[FrameType]) -> bool:
    """Whether one of the frames holds the handler that an error ended in."""
    return error.__traceback__ is not None and error.__traceback__.tb_frame in frames


def _recognise(link: BaseException, outermost: bool) -> BaseException | None:
    text = "" if isinstance(link, EinfoldError) else str(link)
    stop = _STOP_TEXT.match(text)
    if stop is not None:
        return KeyboardInterrupt() if stop.group(1) == "KeyboardInterrupt" else SystemExit(143)
    if isinstance(link, MemoryError) or _MEMORY_TEXT.search(text):
        return OutOfMemoryError(
            "out of memory; `einfold estimate` tells what a model and a context need"
        )
    number = _system_error(link, text)
    if number == errno.ENOMEM:
        return OutOfMemoryError("out of memory: the system gives this process no more")
    if number not in _DISK:
        return None
    # A library tries files that it can do without: of those, only what all files share is told.
    name = getattr(link, "filename", None)
    if not outermost and name is None and number not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return None
    return disk_error(number, name, first_line(link))


def disk_error(number: int, name: object = None, said: str = "") -> DiskError:
    """The sentence for an error number of the system, about the file `name` where it is known."""
    where = str(name) if name is not None else ""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(f"the disk is full: {where or 'a file'} could not be written")
    return DiskError(f"{where}: {os.strerror(number)}" if where else said or os.strerror(number))


def _system_error(link: BaseException, text: str) -> int | None:
    """The system's number of an error, from its attribute or from what it says."""
    if isinstance(link, OSError) and link.errno is not None:
        return link.errno
    found = _DISK_TEXT.search(text)
    if found is not None:
        return int(next(group for group in found.groups() if group))
    if _SHORT_WRITE.search(text):
        return errno.ENOSPC
    words = _DISK_WORDS.search(text)
    return next((n for n in _DISK if words and os.strerror(n) == words.group(0)), None)
