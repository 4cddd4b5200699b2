"""Trellis codes: 2, 3, 4 or a fraction of bits a weight, nearer to what is possible than any scalar."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .....errors import IRError
from ..scheme import PRESETS, SCHEMES, Piece, Preset, Scheme

if TYPE_CHECKING:
    from torch import Tensor

#: Rows are padded to a multiple of this, so that each has a Hadamard matrix worth the name.
_BLOCK = 16


@SCHEMES.register
@dataclass(frozen=True)
class Trellis(Scheme):
    """Rows rotated by a Hadamard matrix (`hadamard.py`), then the nearest stream of a trellis (`trellis.py`).

    stream  u8   [.., N, ceil(T * bits / 8)]    T = M in multiples of 16
    scales  f16  [.., N]                        the root mean square of the rotated row

    `bits`: a multiple of 1/4 from 1 to 5; of 2.5 every other weight adds 2 and 3. `memory`: the bits of a
    window; each more doubles the time of a search and nears the bound of all codes, 4^-bits.

    Squared errors of Gaussian weights, as shares: 0.074, 0.040, 0.0197 and 0.0056 at 2, 2.5, 3 and 4 bits;
    with windows of 12 bits 0.072, 0.038, 0.0193 and 0.0050 (QTIP's, of 16 bits: about 0.07 at 2). The best
    scalar has 0.1175, 0.0345 and 0.0095 at 2, 3 and 4. A matrix of 1536 by 576 takes 4 s of a core, with 12
    bits 10 to 17 s.

    Source: QTIP (Tseng et al. 2024) and EXL3, which rotate both sides of a matrix in blocks and code it in
    tiles of 16 by 16, with weights of inputs; here each row is coded alone, over its inputs, so that rows can
    be read alone. A rotated weight has no code of its own, and is read by rotating it back.
    """

    bits: float = 3.0
    memory: int = 10

    name = "trellis"
    by_itself = False

    def __post_init__(self) -> None:
        if not (1 <= self.bits <= 5 and self.bits * 4 == int(self.bits * 4)):
            raise IRError(f"a trellis has 1 to 5 bits, in quarters, not {self.bits}")
        if not 8 <= self.memory <= 16:
            raise IRError(f"windows have 8 to 16 bits, not {self.memory}")

    def describe(self) -> str:
        return f"a trellis code of {self.bits:g} bits, windows of {self.memory}, rotated"

    @property
    def fewest_rows(self) -> int:
        return 4 * _BLOCK

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        lead, width = shape[:-1], shape[-1] + -shape[-1] % _BLOCK
        return {
            "stream": ((*lead, math.ceil(width * self.bits / 8)), "u8"),
            "scales": (lead, "f16"),
        }

    def groups(self, rows_RM: Tensor) -> Tensor:
        from ..pack import in_blocks

        return in_blocks(rows_RM, _BLOCK).flatten(-2)[:, None]

    def grid(self, groups_RGB: Tensor) -> dict[str, Tensor]:
        return {"scales": groups_RGB.square().mean(-1, keepdim=True).sqrt()}

    def settle(self, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from ..pack import halved

        return {"scales": halved(grid["scales"]).float()}

    def nearest(self, groups_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        from ..hadamard import rotate
        from ..trellis import search

        rotated = rotate(groups_RGB / grid["scales"].clamp(min=1e-8))
        return search(rotated.flatten(0, 1), self.bits, self.memory).view(groups_RGB.shape)

    def values(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        from ..trellis import pack_codes

        stream = pack_codes(codes_RGB, self.bits)
        return self._meant(stream, grid["scales"], codes_RGB.shape[-1])

    def _meant(self, stream: Tensor, scales: Tensor, width: int) -> Tensor:
        from ..hadamard import rotate_back
        from ..trellis import unpack_values

        return rotate_back(unpack_values(stream, width, self.bits, self.memory)) * scales

    def pack(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from ..trellis import pack_codes

        stream = pack_codes(codes_RGB[:, 0], self.bits)
        return {"stream": stream, "scales": grid["scales"].flatten().half()}

    def dequantize(self, pieces: Mapping[str, Tensor], width: int) -> Tensor:
        scales = pieces["scales"].float()[..., None]
        return self._meant(pieces["stream"], scales, width + -width % _BLOCK)[..., :width]


PRESETS.register(Preset("trellis", Trellis(), 1.4))  # 3 bits, as spqr
