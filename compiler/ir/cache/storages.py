"""Storages: how the tokens that a group keeps are stored.

Every group appends new tokens to plain slots. A plain storage has nothing else. A packed one keeps the
newest tokens there, and the runtime packs older ones, `granule` at a time, into *bulk* buffers,
which a step only reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ....errors import IRError
from .sizes import Size
from .text import read, show

#: Bytes of a number of each dtype that a cache may be stored in.
ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "i8": 1, "u8": 1, "i32": 4}


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
class Storage:
    """What the layout asks of a storage; here with the answers of one that packs nothing."""

    name: ClassVar[str]

    @property
    def slot_dtype(self) -> str:
        """Type of the slots."""
        return "f32"

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

    def bulk(
        self, shape: GroupShape, batch: Size, tokens: Size
    ) -> Iterator[tuple[str, tuple[Size, ...], str]]:
        """(name, shape, dtype) of the buffers that hold up to `tokens` packed tokens a row."""
        return iter(())


@dataclass(frozen=True)
class Plain(Storage):
    """Numbers of one dtype, plain or with a fixed scale a channel.

    Printed as `f32`, or `i8/channel`. The scales [heads, size] are weights of the program.
    """

    dtype: str = "f32"
    scales: str = "none"

    name = "plain"

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise IRError(f"a cache can be stored as {', '.join(ITEM_BYTES)}, not {self.dtype!r}")
        if self.scales not in ("none", "channel"):
            raise IRError(f"a cache has scales of kind none or channel, not {self.scales!r}")

    def __str__(self) -> str:
        return self.dtype if self.scales == "none" else f"{self.dtype}/{self.scales}"

    @property
    def slot_dtype(self) -> str:
        return self.dtype


#: Every packed storage by its name in the textual form.
PACKED: dict[str, type[Storage]] = {}


def show_storage(storage: Storage) -> str:
    """The textual form; `read_storage` reads it back."""
    return str(storage) if isinstance(storage, Plain) else show(storage)


def read_storage(text: str) -> Storage:
    """Reads what `show_storage` gives. Raises IRError for an unknown storage."""
    dtype, _, scales = text.partition("/")
    if dtype in ITEM_BYTES or not PACKED:
        return Plain(dtype, scales or "none")
    return read(text, PACKED, "cache storage")
