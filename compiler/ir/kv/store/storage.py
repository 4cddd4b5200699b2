"""What the layout asks of a storage: how the tokens that a group keeps are stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..sizes import Size

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

    @property
    def balanced(self) -> bool:
        """Whether packing asks how large the queries of each channel were."""
        return False

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

    def granules(self, tokens: Size) -> Size:
        """Granules that are packed at most where `tokens` are kept."""
        return 0

    def bulk(
        self, shape: GroupShape, batch: Size, tokens: Size
    ) -> Iterator[tuple[str, tuple[Size, ...], str]]:
        """(name, shape, dtype) of the buffers that hold up to `tokens` packed tokens a row."""
        return iter(())
