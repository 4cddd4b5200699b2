"""Bit planes: one stored file that is read at 8, 6, 4 or any fewer bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .....errors import IRError
from ..scheme import PRESETS, SCHEMES, WIDEST, Piece, Preset, Scheme

if TYPE_CHECKING:
    from torch import Tensor


@SCHEMES.register
@dataclass(frozen=True)
class Planes(Scheme):
    """Codes of `bits` bits as planes of one bit each, the most significant first; `bit_planes.py` has the
    layout.

    Every bit of a code is a sign: w = range * (b_0 / 2 + b_1 / 4 + ..), b = -1 or 1, `range` the largest
    magnitude of a block, in float16. So [-range, range] is cut into 2^bits equal cells, a level in the middle
    of each, and there is no zero level. The cells of fewer bits are unions of those of more, hence the first
    k planes are the nearest weight of k bits over the same range: dropping planes is all that it takes, and
    costs nothing beside a weight that was rounded at k bits (what costs, against integers of k bits that have
    a zero and meet the largest weight, is the grid itself: relative errors of Gaussian weights, block 32, are
    0.0056 against 0.0053 at 8 bits, 0.089 against 0.086 at 4, 0.355 against 0.362 at 2).

    `read`: the planes that are kept; 0 for all. The pieces of a weight at `read` planes are some of the
    pieces of the same weight at all planes, bit by bit: `at` and `kept` cut a stored weight down.

    Source: bipolar-INT (Ma et al. 2024, Efficient Arbitrary Precision Acceleration for Large Language Models
    on GPU Tensor Cores, section 3), whose scale is per row and whose planes are multiplied one by one.
    """

    bits: int = 8
    read: int = 0
    block: int = 32

    name = "planes"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise IRError(f"weights can have 1 to 8 planes, not {self.bits}")
        if not 0 <= self.read <= self.bits:
            raise IRError(f"of {self.bits} planes {self.read} cannot be read; 0 stands for all")
        if self.block % 8 or not 8 <= self.block <= WIDEST:
            raise IRError(f"the block must be a multiple of 8 up to {WIDEST}, not {self.block}")

    @property
    def depth(self) -> int:
        """The planes that are read."""
        return self.read or self.bits

    def describe(self) -> str:
        return f"{self.depth} of {self.bits} bit planes, block {self.block}"

    @property
    def fewest_rows(self) -> int:
        return 4 * self.block

    def at(self, read: int) -> Planes:
        """The scheme that reads the first planes of what this one stores."""
        return replace(self, read=read)

    def kept(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the pieces of a weight with more planes those that this scheme reads."""
        wanted = [f"plane{index}" for index in range(self.depth)] + ["range"]
        return {name: pieces[name] for name in wanted}

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        lead, groups = shape[:-1], math.ceil(shape[-1] / self.block)
        plane: Piece = ((*lead, groups, self.block // 8), "u8")
        found = {f"plane{index}": plane for index in range(self.depth)}
        return found | {"range": ((*lead, groups), "f16")}

    def groups(self, rows_RM: Tensor) -> Tensor:
        from ..pack import in_blocks

        return in_blocks(rows_RM, self.block)

    def grid(self, groups_RGB: Tensor) -> dict[str, Tensor]:
        return {"range": groups_RGB.abs().amax(-1, keepdim=True)}

    def settle(self, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from ..pack import halved

        return {"range": halved(grid["range"]).float()}

    def nearest(self, groups_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        cells = 1 << self.bits
        places = (groups_RGB / grid["range"].clamp(min=1e-8)).add_(1).mul_(cells / 2)
        return places.floor_().clamp_(0, cells - 1)

    def values(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        return self._middles((codes_RGB / (1 << (self.bits - self.depth))).floor()) * grid["range"]

    def _middles(self, cells: Tensor) -> Tensor:
        """The middles of cells of the depth, in units of the range: exact."""
        return (cells * 2 + (1 - (1 << self.depth))) / (1 << self.depth)

    def pack(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from ..bit_planes import planes_of

        planes = planes_of(codes_RGB, self.bits)[: self.depth]
        found = {f"plane{index}": plane for index, plane in enumerate(planes)}
        return found | {"range": grid["range"].squeeze(-1).half()}

    def dequantize(self, pieces: Mapping[str, Tensor], width: int) -> Tensor:
        from ..bit_planes import from_planes

        cells = from_planes([pieces[f"plane{index}"] for index in range(self.depth)])
        values = self._middles(cells) * pieces["range"].float()[..., None]
        return values.flatten(-2)[..., :width]


PRESETS.register(Preset("planes", Planes(), 0.2))  # as int8
