"""What is kept of the memory that this process let go of: by the C library, and of files that were mapped."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from . import mapped

#: From which size on blocks are none of the heap's, as it was set last; 0 where it was not.
_in_force = 0

#: The largest block that may be the heap's.
_LARGEST = 32 << 20

#: glibc's numbers of what can be set: bytes at the end of the heap that it keeps, the smallest block that is
#: none of the heap's, and how many heaps there are.
_TRIM, _MAPPED, _ARENAS = -1, -3, -8


def give_back() -> None:
    """Gives back to the system what was let go of, which the C library keeps otherwise: 270 MB where
    onnxruntime has brought 100 million 3-bit codes into 4 bits. So go pages of checkpoints."""
    _ask("malloc_trim", 0)
    mapped.let_go()


def one_heap() -> None:
    """Has the C library take memory from one heap: else threads of sessions leave theirs behind."""
    _ask("mallopt", _ARENAS, 1)


def leave_from(nbytes: int) -> None:
    """Has blocks of so many bytes and more, 32 MiB at most, go to the system as soon as they are let go of.

    The C library raises that bound by itself to the largest block that it saw: values of a prompt then lie in
    the heap, which they leave full of holes. Of a chunk of 512 tokens, 97 MB by their sizes, it kept 250. It
    is one bound for the process, so whoever needs one asks for it whenever it counts.
    """
    global _in_force
    if nbytes != _in_force:
        _ask("mallopt", _MAPPED, nbytes)
        _ask("mallopt", _TRIM, 2 * nbytes)
        give_back()
        _in_force = nbytes


@contextmanager
def leaving_from(nbytes: int) -> Iterator[None]:
    """The same for some time; then blocks stay again, up to the largest that may, which is faster."""
    leave_from(nbytes)
    try:
        yield
    finally:
        leave_from(_LARGEST)


def _ask(name: str, *numbers: int) -> None:
    """Calls a function that glibc has; other libraries do without."""
    function = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
    if function is not None:
        function(*numbers)
