"""A hook into torch's allocator on CPUs: every block of memory that tensors take while it hangs there.

Torch's profiler is told of blocks by the allocator itself. This looks one step further down: at the call by
which libc10 asks the C library, whose slot in that library's table of foreign functions is bent.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

#: Tags of an ELF file's dynamic section.
_STRINGS, _SYMBOLS, _RELA, _RELA_BYTES, _PLT_BYTES, _PLT = 5, 6, 7, 8, 2, 23

_Ask = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t
)


@contextmanager
def asked() -> Iterator[list[int]]:
    """The bytes of each block that torch asks for within, in the order of the calls."""
    sizes: list[int] = []
    slot = _slot("libc10.so", b"posix_memalign")
    own = ctypes.c_void_p.from_address(slot).value
    assert own is not None
    ask = _Ask(own)

    @_Ask
    def noting(place: ctypes._Pointer[ctypes.c_void_p], alignment: int, size: int) -> int:
        sizes.append(size)
        return int(ask(place, alignment, size))

    _bend(slot, ctypes.cast(noting, ctypes.c_void_p).value)
    try:
        yield sizes
    finally:
        _bend(slot, own)


def _bend(slot: int, to: int | None) -> None:
    """Writes an address into a table that the loader has made read-only."""
    libc, page = ctypes.CDLL(None, use_errno=True), 4096
    start = ctypes.c_void_p(slot // page * page)
    if libc.mprotect(start, page, 3):
        raise OSError(ctypes.get_errno(), "mprotect")
    ctypes.c_void_p.from_address(slot).value = to


def _slot(library: str, name: bytes) -> int:
    """Where a loaded library keeps the address of a function of another one."""
    base = _base(library)
    tags = dict(_dynamic(base))
    symbols, strings = tags[_SYMBOLS], tags[_STRINGS]
    for table, length in ((_PLT, _PLT_BYTES), (_RELA, _RELA_BYTES)):
        if table not in tags:
            continue
        entries = ctypes.string_at(tags[table], tags[length])
        for offset, information, _ in struct.iter_unpack("<QQq", entries):
            (at,) = struct.unpack("<I", ctypes.string_at(symbols + 24 * (information >> 32), 4))
            if ctypes.string_at(strings + at) == name:
                return base + int(offset)
    raise LookupError(f"{library} does not call {name.decode()}")


def _base(library: str) -> int:
    torch.empty(0)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith(f"/{library}"):
            return int(line.split("-")[0], 16)
    raise LookupError(f"{library} is not loaded")


def _dynamic(base: int) -> Iterator[tuple[int, int]]:
    """The dynamic section: tags and what they say; the loader has made addresses of places."""
    header = ctypes.string_at(base, 64)
    (programs,) = struct.unpack_from("<Q", header, 32)
    size, count = struct.unpack_from("<HH", header, 54)
    for at in range(count):
        entry = ctypes.string_at(base + programs + size * at, size)
        kind, _, _, place = struct.unpack_from("<IIQQ", entry)
        if kind == 2:
            (length,) = struct.unpack_from("<Q", entry, 40)
            yield from struct.iter_unpack("<qQ", ctypes.string_at(base + place, length))
