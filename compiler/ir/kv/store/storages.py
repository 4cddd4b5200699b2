"""Storages: how the tokens that a group keeps are stored.

Every group appends new tokens to plain slots. A plain storage has nothing else. A packed one keeps the
newest tokens there, and the runtime packs older ones, `granule` at a time, into *bulk* buffers,
which a step only reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from .....errors import IRError
from ..text import read, show
from .gear.storage import Gear
from .kivi.storage import Kivi
from .low_rank.storage import LowRank
from .minicache.storage import MiniCache
from .mixed import MiKV, ZipCache
from .storage import ITEM_BYTES, GroupShape, Storage

__all__ = [
    "ITEM_BYTES",
    "PACKED",
    "Gear",
    "GroupShape",
    "Kivi",
    "LowRank",
    "MiKV",
    "MiniCache",
    "Plain",
    "Storage",
    "ZipCache",
    "read_storage",
    "show_storage",
]


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


#: Every storage but the plain one, by its name in the textual form.
PACKED: dict[str, type[Storage]] = {
    kind.name: kind for kind in (Kivi, Gear, ZipCache, MiKV, MiniCache, LowRank)
}


def show_storage(storage: Storage) -> str:
    """The textual form; `read_storage` reads it back."""
    return str(storage) if isinstance(storage, Plain) else show(storage)


def read_storage(text: str) -> Storage:
    """Reads what `show_storage` gives. Raises IRError for an unknown storage."""
    dtype, _, scales = text.partition("/")
    if dtype in ITEM_BYTES:
        return Plain(dtype, scales or "none")
    return read(text, PACKED, "cache storage")
