"""MiniCache: two layers share the directions of their keys and values, each keeps their lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ......errors import IRError
from ....options import derived, missing, option, settle
from ..packed import Packed
from ..storage import STORAGES, GroupShape, Piece


@STORAGES.register
@dataclass(frozen=True)
class MiniCache(Packed):
    """Merged directions, a length a token, and a few tokens as they were (Liu et al. 2024, section 4).

    The deeper layer of a pair names the other as its `partner`, and reads that layer's directions and
    places. In each `group` of tokens of a head, up to `rows` (a share `retained`) are kept unmerged in both
    layers: those whose angular distance is within `gamma` of the spread from the largest. Where there are
    more than that, the least distant of them are merged. `slerp` leans to the partner's direction at 0, to
    the deeper layer's at 1.
    """

    residual: int = 64
    group: int = 64
    rows: int = derived()
    slerp: float = 0.6
    gamma: float = 0.05
    dtype: str = "f32"
    retained: float = option(0.05)

    name = "minicache"

    def __post_init__(self) -> None:
        if not 0 <= self.retained <= 1:
            raise IRError(f"{self.name}: a share of 0 to 1 is retained, not {self.retained}")
        if missing(self.rows):
            settle(self, rows=math.ceil(self.retained * self.group))
        self.check_waiting()
        if self.group < 1 or not 0 <= self.rows <= self.group:
            raise IRError(
                f"{self.name}: 1 or more tokens are merged together, and 0 to all of them retained, "
                f"not {self.group} and {self.rows}"
            )
        if not (0 <= self.slerp <= 1 and 0 <= self.gamma <= 1):
            raise IRError(
                f"{self.name}: slerp and gamma are shares from 0 to 1, not {self.slerp} and {self.gamma}"
            )
        if self.dtype not in ("f32", "f16"):
            raise IRError(f"{self.name}: directions are stored as f32 or f16, not {self.dtype!r}")

    @property
    def granule(self) -> int:
        return self.group

    @property
    def shared(self) -> frozenset[str]:
        return frozenset(f"{part}_{what}" for part in ("key", "value") for what in _SHARED)

    def check(self, shape: GroupShape) -> None:
        """Heads of any size can be merged."""

    def pieces(self, shape: GroupShape) -> Iterator[Piece]:
        for part in ("key", "value"):
            size = shape.size(part)
            yield Piece(f"{part}_direction", self.group, size, self.dtype)
            yield Piece(f"{part}_length", self.group, 1, "f32")
            if self.rows:
                yield Piece(f"{part}_kept", self.rows, size, self.dtype)
                yield Piece(f"{part}_place", self.rows, 1, "i32")


#: What the deeper layer of a pair reads of its partner.
_SHARED = ("direction", "place")
