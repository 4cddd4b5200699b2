"""Plain slots."""

from __future__ import annotations

from dataclasses import dataclass

from ......errors import IRError
from ....item_bytes import ITEM_BYTES
from ..storage import HALF_BYTES, STORAGES, Storage


@STORAGES.register
@dataclass(frozen=True)
class Plain(Storage):
    """Numbers of one dtype, plain or with a fixed scale a channel.

    Printed as `f32`, `i8/channel` or `i4/channel`. The scales [heads, size] are weights of the program.
    Of `i4`, which always has scales, a byte holds the codes of two channels (`ir/kv/codes/half_bytes.py`),
    and keys are rotated over the channels of each head.
    """

    dtype: str = "f32"
    scales: str = "none"

    name = "plain"

    def __post_init__(self) -> None:
        if self.dtype not in (*ITEM_BYTES, HALF_BYTES):
            known = ", ".join((*ITEM_BYTES, HALF_BYTES))
            raise IRError(f"a cache can be stored as {known}, not {self.dtype!r}")
        if self.scales not in ("none", "channel"):
            raise IRError(f"a cache has scales of kind none or channel, not {self.scales!r}")
        if self.halved and self.scales == "none":
            raise IRError(
                f"a cache of {HALF_BYTES} has a scale a channel; write {HALF_BYTES}/channel"
            )

    @property
    def halved(self) -> bool:
        """Whether a byte of the slots holds the codes of two channels."""
        return self.dtype == HALF_BYTES

    @property
    def text(self) -> str:
        return self.dtype if self.scales == "none" else f"{self.dtype}/{self.scales}"

    @property
    def plain(self) -> bool:
        return True

    @property
    def slot_dtype(self) -> str:
        return "u8" if self.halved else self.dtype

    def slot_width(self, size: int) -> int:
        if not self.halved:
            return size
        if size % 2:
            raise IRError(
                f"two codes of 4 bits are a byte, and a head of {size} numbers has one over"
            )
        return size // 2

    @property
    def rotated(self) -> tuple[str, ...]:
        return ("key",) if self.halved else ()
