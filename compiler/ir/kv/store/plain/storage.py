"""Plain slots."""

from __future__ import annotations

from dataclasses import dataclass

from ......errors import IRError
from ....item_bytes import ITEM_BYTES
from ..storage import STORAGES, Storage


@STORAGES.register
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

    @property
    def text(self) -> str:
        return self.dtype if self.scales == "none" else f"{self.dtype}/{self.scales}"

    @property
    def plain(self) -> bool:
        return True

    @property
    def slot_dtype(self) -> str:
        return self.dtype
