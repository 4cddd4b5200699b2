"""What a storage is: how the tokens that a group keeps are stored.

Every group appends new tokens to plain slots. A plain storage has nothing else. A packed one keeps the
newest tokens there, and the first few, and the runtime packs the others, `granule` at a time, into *bulk*
buffers, which a step only reads.

A storage is a folder here: `storage.py` says what it takes of memory, without torch; `codec.py` packs and
unpacks it in torch, `stream.py` says how a kernel reads it, where it packs anything. Its fields are the
options of the method that recipes know it by (`method`), and, but for those that are marked otherwise, its
text in graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...item_bytes import ITEM_BYTES
from ...options import Options
from ...record_text import read, show
from ...registry import Registry
from ..sizes import Size


@dataclass(frozen=True)
class GroupShape:
    """The sizes that a group's buffers are made of."""

    heads: int
    key_size: int
    value_size: int

    def size(self, part: str) -> int:
        """Numbers a head and token of the "key" or the "value"."""
        return self.key_size if part == "key" else self.value_size


@dataclass(frozen=True)
class Piece:
    """One matrix of a packed granule, for each head: [rows, width] of `dtype`."""

    name: str
    rows: int
    width: int
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of it, for one head."""
        return self.rows * self.width * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Storage(Options):
    """What the layout asks of a storage; here with the answers of one that packs nothing."""

    name: ClassVar[str]
    """In the text of a layout."""
    method: ClassVar[str] = ""
    """The method of `[cache.quant]` that gives it to every group; none where it is empty."""

    @property
    def text(self) -> str:
        """The textual form, `name(field=value,..)`."""
        return show(self)

    @property
    def plain(self) -> bool:
        """Whether the slots are all, in numbers of one type."""
        return False

    @property
    def slot_dtype(self) -> str:
        """Type of the slots."""
        return "f32"

    def slot_width(self, size: int) -> int:
        """Elements of a slot that holds so many numbers."""
        return size

    @property
    def lead(self) -> int:
        """Oldest tokens that are never packed."""
        return 0

    @property
    def newest(self) -> int:
        """Newest tokens that are never packed."""
        return 0

    @property
    def waiting(self) -> int:
        """Tokens that may wait in the slots beyond those; 0 where nothing is packed."""
        return 0

    @property
    def granule(self) -> int:
        """Tokens that are packed together."""
        return 1

    @property
    def exact(self) -> bool:
        """Whether nothing is packed until the prompt has been read."""
        return False

    @property
    def scored(self) -> bool:
        """Whether packing asks how much attention tokens got."""
        return False

    @property
    def balanced(self) -> bool:
        """Whether packing asks how large the queries of each channel were."""
        return False

    @property
    def rotated(self) -> tuple[str, ...]:
        """Parts of a token, "key" or "value", that the graph brings rotated over the channels of each head.

        `passes/cache/rotate_heads.py` puts the rotation around attention; slots and codes hold what it gives,
        and neither codecs nor kernels know of it.
        """
        return ()

    @property
    def ordered(self) -> tuple[str, ...]:
        """Parts of a token, "key" or "value", whose channels the graph brings in an order that is found for
        each head, in which those stand together that lose little `together`.

        `passes/cache/order_channels.py` puts it around attention; codecs and kernels do not know of it.
        """
        return ()

    @property
    def together(self) -> int:
        """Channels that share a scale or an exponent, where channels are ordered."""
        return 1

    @property
    def integral(self) -> bool:
        """Whether what is packed are codes of 4 bits with even levels, two a byte, under a scale for each
        token or block of its channels: products of integers take them as they are."""
        return False

    @property
    def scattered(self) -> bool:
        """Whether where a number stands in a piece depends on what was packed, so that no kernel reads it."""
        return False

    def without_kernels(self) -> str:
        """Why no kernel reads it, in a sentence; "" where one may."""
        if not self.scattered:
            return ""
        return (
            f"no kernel reads what {self.name} stores, for where a number stands depends on its token; "
            "compile for the target reference"
        )

    @property
    def windowed(self) -> bool:
        """Whether the slots hold a window, and what `whole` gives stands for the other tokens."""
        return False

    def whole(
        self, shape: GroupShape, batch: Size, capacity: Size
    ) -> Iterator[tuple[str, tuple[Size, ...], str]]:
        """(name, shape, dtype) of the buffers that a step writes beside the slots, for every token."""
        return iter(())

    @property
    def shared(self) -> frozenset[str]:
        """Names of the bulk buffers that a group with a partner reads of it and does not hold itself."""
        return frozenset()

    def pieces(self, shape: GroupShape) -> Iterator[Piece]:
        """What a granule becomes, in the order in which operators take it."""
        return iter(())

    def granules(self, tokens: Size) -> Size:
        """Granules that are packed at most where `tokens` are kept."""
        return 0

    def bulk(
        self, shape: GroupShape, batch: Size, tokens: Size
    ) -> Iterator[tuple[str, tuple[Size, ...], str]]:
        """(name, shape, dtype) of the buffers that hold up to `tokens` packed tokens a row."""
        return iter(())


#: Codes of 4 bits, two of which are a byte of type u8: numbers of no type that a layout's buffers have.
HALF_BYTES = "i4"

#: Every storage by its name in the text of a layout.
STORAGES: Registry[type[Storage]] = Registry("cache storage", __package__, module="storage")


def read_storage(text: str) -> Storage:
    """Reads a storage's `text`. Raises IRError for an unknown storage."""
    dtype, _, scales = text.partition("/")
    if dtype in (*ITEM_BYTES, HALF_BYTES):
        return read(f"plain(dtype={dtype},scales={scales or 'none'})", STORAGES, "cache storage")
    return read(text, STORAGES, "cache storage")
