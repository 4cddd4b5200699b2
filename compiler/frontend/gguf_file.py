"""The header of a GGUF file: what it says of the model, and where its tensors are.

    magic "GGUF", version u32, tensors u64, keys u64,
    keys x (name string, type u32, value),
    tensors x (name string, axes u32, sizes u64.., type u32, offset u64),
    padding to general.alignment, data
Strings are a length u64 and their bytes; all is little-endian. Source: ggml's docs/gguf.md, versions 2 and 3.

The file is anybody's: every length is held against the file's size before anything is read or allocated, so
that other readers, which trust them, can be given the file afterwards.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ModelError, UnsupportedError, pass_on

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}

#: Axes of a tensor, bytes of a name, and the largest alignment that is believed.
_MOST_AXES, _LONGEST_NAME, _LARGEST_ALIGNMENT = 4, 1 << 16, 1 << 20


@dataclass(frozen=True)
class Array:
    """A value of several, of which only the number is read."""

    count: int


@dataclass(frozen=True)
class Entry:
    """One tensor: its shape, slowest axis first, ggml's number of its type, and its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """A file whose header was read and holds together."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, Entry]

    @property
    def architecture(self) -> str:
        return str(self.keys.get("general.architecture", ""))

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, mapped."""
        entry = self.tensors[name]
        return np.memmap(self.path, np.uint8, "r", entry.start, (entry.nbytes,))


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF does, or is called so."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC or path.suffix == ".gguf"
    except OSError as error:
        pass_on(error)
        return path.suffix == ".gguf"


def read_gguf(path: Path, sizes: Callable[[int], tuple[int, int]]) -> GgufFile:
    """Reads the header; `sizes` gives (weights, bytes) of a block of a type, and KeyError for an unknown one.

    Raises ModelError for a file that is damaged or cut off, and UnsupportedError for one of another version
    or with a type that is not known.
    """
    try:
        return _Reader(path, sizes).read()
    except OSError as error:
        pass_on(error)
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is damaged: a name in its header is no text") from error


class _Reader:
    def __init__(self, path: Path, sizes: Callable[[int], tuple[int, int]]) -> None:
        self.path, self.sizes = path, sizes
        self.size = path.stat().st_size

    def read(self) -> GgufFile:
        with self.path.open("rb") as self.file:
            if self._bytes(4) != MAGIC:
                raise ModelError(f"{self.path} is no GGUF file: it begins with something else")
            (version,) = self._numbers("I", 1)
            if version not in _VERSIONS:
                raise UnsupportedError(
                    f"{self.path} is a GGUF of version {version}; 2 and 3 are read, little-endian"
                )
            tensors, keys = self._numbers("Q", 2)
            # an entry has a name and more: no file holds more of them than it has bytes by this
            if tensors * 24 + keys * 12 > self.size:
                raise self._cut()
            found: dict[str, Any] = {}
            for _ in range(keys):
                name = self._string(_LONGEST_NAME)
                if name in found:
                    raise ModelError(f"{self.path} is damaged: it sets {name!r} twice")
                found[name] = self._value(*self._numbers("I", 1))
            raw = [self._entry() for _ in range(tensors)]
            start = self._data_start(found.get("general.alignment", 32))
            return GgufFile(self.path, found, self._placed(raw, start))

    def _cut(self) -> ModelError:
        return ModelError(
            f"{self.path} is {self.size:,} bytes, and its header asks for more: it is cut off or damaged"
        )

    def _bytes(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise self._cut()
        return self.file.read(count)

    def _numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{kind}", self._bytes(struct.calcsize(f"<{kind}") * count))

    def _string(self, most: int | None = None) -> str:
        (length,) = self._numbers("Q", 1)
        if most is not None and length > most:
            raise ModelError(f"{self.path} is damaged: a name in its header has {length:,} bytes")
        return self._bytes(length).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._numbers(_NUMBERS[kind], 1)[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ModelError(f"{self.path} is damaged: its header has a value of type {kind}")
        inner, count = *self._numbers("I", 1), *self._numbers("Q", 1)
        if inner in _NUMBERS:
            self._skip(count * struct.calcsize(f"<{_NUMBERS[inner]}"))
        elif inner == _STRING:
            if count * 8 > self.size - self.file.tell():
                raise self._cut()
            for _ in range(count):
                self._skip(*self._numbers("Q", 1))
        else:
            raise ModelError(f"{self.path} is damaged: its header has an array of type {inner}")
        return Array(count)

    def _skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise self._cut()
        self.file.seek(count, 1)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(_LONGEST_NAME)
        (axes,) = self._numbers("I", 1)
        if axes > _MOST_AXES:
            raise ModelError(f"{self.path} is damaged: tensor {name!r} has {axes} axes")
        sizes = self._numbers("Q", axes)
        kind, offset = *self._numbers("I", 1), *self._numbers("Q", 1)
        return name, tuple(reversed(sizes)), kind, offset

    def _data_start(self, alignment: Any) -> int:
        known = isinstance(alignment, int) and 0 < alignment <= _LARGEST_ALIGNMENT
        if not known or alignment & (alignment - 1):
            raise ModelError(f"{self.path} is damaged: general.alignment is {alignment!r}")
        at = self.file.tell()
        return at + -at % int(alignment)

    def _placed(
        self, raw: list[tuple[str, tuple[int, ...], int, int]], start: int
    ) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for name, shape, kind, offset in raw:
            if name in found:
                raise ModelError(f"{self.path} is damaged: it holds tensor {name!r} twice")
            try:
                weights, nbytes = self.sizes(kind)
            except (KeyError, ValueError):
                raise UnsupportedError(
                    f"{self.path}: tensor {name!r} has a type ({kind}) that the installed gguf package does "
                    "not know; a newer one may"
                ) from None
            if not shape or shape[-1] % weights:
                raise ModelError(
                    f"{self.path} is damaged: tensor {name!r} is {list(shape)}, which is no whole number of "
                    f"blocks of {weights}"
                )
            entry = Entry(name, shape, kind, start + offset, math.prod(shape) // weights * nbytes)
            if entry.start + entry.nbytes > self.size:
                raise ModelError(
                    f"{self.path} is {self.size:,} bytes, and tensor {name!r} would end at byte "
                    f"{entry.start + entry.nbytes:,}: the file is cut off or damaged"
                )
            found[name] = entry
        return found
