"""Formats of 4-bit levels as the papers have them: what kernels are checked against."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from einfold.compiler.ir.quant.pack import unpack_bits
from einfold.compiler.ir.quant.scheme import Piece, Scheme

#: QLoRA (Dettmers et al. 2023), appendix E.
NORMAL = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
#: OCP Microscaling Formats v1.0, table 5.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Nf4(Scheme):
    """packed u8 [N, G, block / 2], low nibble first; scales f32 [N, G]."""

    block: int = 64

    name = "nf4"
    levels: ClassVar[tuple[float, ...]] = NORMAL

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        lead = (*shape[:-1], math.ceil(shape[-1] / self.block))
        return {"packed": ((*lead, self.block // 2), "u8"), "scales": (lead, "f32")}

    def random(self, rows: int, width: int) -> dict[str, Tensor]:
        """Pieces that stand for something."""
        sizes = {name: size for name, (size, _) in self.pieces((rows, width)).items()}
        packed = torch.randint(0, 256, sizes["packed"], dtype=torch.uint8)
        return {"packed": packed, "scales": torch.rand(sizes["scales"])}

    def scales(self, pieces: Mapping[str, Tensor]) -> Tensor:
        return pieces["scales"]

    def dequantize(self, pieces: Mapping[str, Tensor], width: int) -> Tensor:
        codes = unpack_bits(pieces["packed"], 4, self.block)
        wide = torch.tensor(self.levels)[codes.int()] * self.scales(pieces)[..., None]
        return wide.flatten(-2)[..., :width]


@dataclass(frozen=True)
class Mxfp4(Nf4):
    """Blocks of 32 under E8M0 scales u8 [N, G]: 2^(code - 127)."""

    block: int = 32

    name = "mxfp4"
    levels = (*E2M1, *(-level for level in E2M1))

    def __str__(self) -> str:
        return self.name  # a block of 32 is the format, not an option

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        found = super().pieces(shape)
        return found | {"scales": (found["scales"][0], "u8")}

    def random(self, rows: int, width: int) -> dict[str, Tensor]:
        found = super().random(rows, width)
        # Within a few powers of two, but for one row: the smallest scale that there is, a subnormal number.
        codes = torch.randint(120, 133, found["scales"].shape, dtype=torch.uint8)
        codes[0] = 0
        return found | {"scales": codes}

    def scales(self, pieces: Mapping[str, Tensor]) -> Tensor:
        return torch.ldexp(torch.ones(()), pieces["scales"].int() - 127)


LEVELS = {"nf4": Nf4, "nf4 in groups of 16": partial(Nf4, 16), "mxfp4": Mxfp4}
