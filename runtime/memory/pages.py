"""A file that somebody else has mapped, such as onnxruntime: its pages brought and let go by this process.

    page cache      | brought, unit by unit, through a mapping of our own  | let go (posix_fadvise)
    their mapping   |                    faults find the pages there       | let go (madvise)

Whatever is done or left undone here, their mapping reads the file: a page that is not there is read when it
is asked for. Linux from 5.14 on. Pages are brought in units of a large page: so the kernel reads exactly what
is asked for, whatever it is set to read ahead, and by one folio, for a twentieth of the processor's time.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path

import numpy as np
from blake3 import blake3

from ...compiler.ir.regular import open_regular
from ...errors import ArtifactError, UnsupportedError
from .direct import PAGE, READERS, twice

#: Bytes that are brought at once.
UNIT = 2 << 20

#: Bytes around a fault that the kernel maps beside, where their pages are there already.
_AROUND = 64 << 10

#: Bytes of what is there that are hashed at once; they fit a processor's cache.
_HASHED = 256 << 10

#: The kernel's numbers of advice that Python has no names for.
_HUGE, _BRING = 14, 22


@dataclass(frozen=True)
class Mapped:
    """A stretch of the file in this process's addresses."""

    address: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class PagedFile:
    """Brings units of a file into the system's page cache, and lets them go; counts the bytes.

    Mappings that were there before this was made are of others who know nothing of it, as where an artifact
    is loaded twice: they may end at any time, and what lies at their addresses then must not be let go.
    """

    def __init__(self, path: Path) -> None:
        """Raises UnsupportedError where the system cannot bring pages on demand, ArtifactError for what is
        no regular file."""
        self.path = path
        self.bytes_read = 0
        self.theirs: tuple[Mapped, ...] = ()
        """What others have mapped since this was made, as of the last `look`."""
        self._descriptor = open_regular(path)
        self._found = self._state()
        self.size = self._found[0]
        try:
            self._before = self._mappings()
            self._pagemap().close()
            self._map = mmap.mmap(self._descriptor, self.size, mmap.MAP_SHARED, mmap.PROT_READ)
            self._own = Mapped(np.frombuffer(self._map, np.uint8).ctypes.data, 0, self.size)
            self._advise(self._own, mmap.MADV_RANDOM)
            with suppress(OSError):  # a kernel without large pages brings small ones
                self._advise(self._own, _HUGE)
            first = Mapped(self._own.address, 0, min(UNIT, self.size))
            self._advise(first, _BRING)
            self._advise(first, mmap.MADV_DONTNEED)
        except (OSError, ValueError, AttributeError) as error:
            self.close()
            raise UnsupportedError(
                f"this system does not bring pages of {path} on demand ({error}); Linux from 5.14 on does"
            ) from error

    def bring(self, unit: int) -> None:
        """Reads a unit, and waits for it. Raises ArtifactError where the file changed, DiskError where the
        disk fails twice."""
        start = unit * UNIT
        part = Mapped(self._own.address + start, start, min(UNIT, self.size - start))

        def read() -> None:
            try:
                self._advise(part, _BRING)
            except OSError:
                self.check()
                raise

        twice(read, self.path, start, part.length)
        self.bytes_read += part.length
        # Counted twice it would be else, and not be let go: the page cache has it.
        self._advise(part, mmap.MADV_DONTNEED)

    def bring_hashed(self, start: int, end: int) -> str:
        """Brings a stretch, and gives its BLAKE3 hash in hex. Raises as `bring`."""
        digest, units = blake3(), range(start // UNIT, -(-end // UNIT))
        with ThreadPoolExecutor(READERS, "einfold-bring") as pool:
            for unit, _ in zip(units, pool.map(self.bring, units), strict=True):
                last = min(end, (unit + 1) * UNIT)
                for place in range(max(start, unit * UNIT), last, _HASHED):
                    length = min(_HASHED, last - place)
                    read = partial(os.pread, self._descriptor, length, place)
                    digest.update(twice(read, self.path, place, length))
        return digest.hexdigest()

    def unmap(self, start: int, end: int) -> None:
        """Has others find the pages of a stretch anew, so that `touched` tells which they read from now
        on."""
        for part in self._overlapping(start, end):
            self._advise(part, mmap.MADV_DONTNEED)

    def let_go(self, start: int, end: int) -> None:
        """Gives the memory of a stretch back, of whole pages."""
        self.unmap(start, end)
        os.posix_fadvise(self._descriptor, start, end - start, os.POSIX_FADV_DONTNEED)

    def look(self, within: Iterable[tuple[int, int]] = ()) -> None:
        """Finds the mappings of others. Those `within` stretches bring a unit where a page is not there."""
        known = (*self._before, self._own)
        self.theirs = tuple(
            part
            for part in self._mappings()
            if not any(k.address <= part.address < k.address + k.length for k in known)
        )
        for start, end in within:
            for part in self._overlapping(start, end):
                self._advise(part, mmap.MADV_RANDOM)
                with suppress(OSError):
                    self._advise(part, _HUGE)

    def is_mapped(self, start: int, length: int) -> bool:
        """Whether one mapping of others has all of a stretch."""
        return any(m.offset <= start and start + length <= m.end for m in self.theirs)

    def touched(self, start: int, end: int) -> tuple[int, ...]:
        """The units of a stretch of which others have read pages since they were let go.

        A fault maps pages beside it too, when they are there: a few that go on from the unit before or into
        the next are not taken for read.
        """
        found = np.zeros((end - start) // PAGE, bool)
        with self._pagemap() as stream:
            for part in self._overlapping(start, end):
                there, first = _there(stream, part), (part.offset - start) // PAGE
                found[first : first + len(there)] |= there
        return tuple(start // UNIT + unit for unit in _units_read(found))

    def mapped(self, units: Iterable[int]) -> tuple[int, ...]:
        """Those of them of which others have a page, brought or read by themselves. What other processes read
        is not among them."""
        with self._pagemap() as stream:
            return tuple(
                unit
                for unit in units
                for parts in [self._overlapping(unit * UNIT, (unit + 1) * UNIT)]
                if any(_there(stream, part).any() for part in parts)
            )

    def check(self) -> None:
        """Raises ArtifactError where the file was written to, or cut short, after it was opened."""
        if self._state() != self._found:
            raise ArtifactError(
                f"{self.path} was changed after it was opened: load the artifact again"
            )

    def close(self) -> None:
        """Gives up the file. What is mapped of it stays as long as this object and theirs."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _mappings(self) -> list[Mapped]:
        """Where this process has the file mapped."""
        found, path = [], os.fsencode(self.path)
        with open("/proc/self/maps", "rb") as stream:
            for line in stream:
                words = line.rstrip(b"\n").split(None, 5)
                if len(words) == 6 and words[5] == path:
                    first, last = (int(word, 16) for word in words[0].split(b"-"))
                    found.append(Mapped(first, int(words[2], 16), last - first))
        return found

    def _pagemap(self) -> FileIO:
        """Says of each page of this process whether it is there; a kernel may have been built without."""
        return FileIO("/proc/self/pagemap")

    def _overlapping(self, start: int, end: int) -> Sequence[Mapped]:
        """The parts of others' mappings within a stretch."""
        found = []
        for m in self.theirs:
            first, last = max(start, m.offset), min(end, m.end)
            if first < last:
                found.append(Mapped(m.address + first - m.offset, first, last - first))
        return found

    def _advise(self, part: Mapped, advice: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.madvise(ctypes.c_void_p(part.address), ctypes.c_size_t(part.length), advice):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns


def no_paging() -> str:
    """Why this system cannot bring pages; "" where it may."""
    if not sys.platform.startswith("linux"):
        return "pages are brought on demand on Linux alone"
    release = [
        int(word) for word in os.uname().release.split("-")[0].split(".")[:2] if word.isdigit()
    ]
    return "" if tuple(release) >= (5, 14) else "pages are brought on demand by Linux from 5.14 on"


def _there(pagemap: FileIO, part: Mapped) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which pages of a mapping are there."""
    pagemap.seek(part.address // PAGE * 8)
    entries = np.frombuffer(pagemap.read(part.length // PAGE * 8), np.uint64)
    return (entries >> np.uint64(63)).astype(bool)


def _units_read(pages: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> list[int]:
    """Units with pages that were read. A run across an edge of units that has less than what is mapped
    around a fault on one side is not counted there."""
    each, few = UNIT // PAGE, _AROUND // PAGE
    edges = np.flatnonzero(np.diff(np.concatenate(([False], pages, [False]))))
    units = set()
    for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        for unit in range(first // each, (last - 1) // each + 1):
            own = min(last, (unit + 1) * each) - max(first, unit * each)
            if own >= few or own == last - first:
                units.add(unit)
    return sorted(units)
