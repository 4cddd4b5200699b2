"""BitMoD: small floats whose redundant zero becomes one more level, chosen for each group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .....errors import IRError
from ..scheme import PRESETS, SCHEMES, Piece, Preset, Scheme

if TYPE_CHECKING:
    from torch import Tensor

#: Levels of the float by its bits, of one sign, and the magnitudes that may stand in for its second zero:
#: one within the range (more resolution), one beyond it (a range with a longer side).
_POSITIVE = {3: (1.0, 2.0, 4.0), 4: (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)}
_SPECIAL = {3: (3.0, 6.0), 4: (5.0, 8.0)}


@SCHEMES.register
@dataclass(frozen=True)
class BitMod(Scheme):
    """fp4 (E2M1) or fp3 (E2M0) levels in groups of one scale; a level more, one of four, for each group.

    codes   u8   [.., N, G, bits * group / 8]   bit planes; code c stands for level c of the group's table,
                                                lowest first
    special u8   [.., N, ceil(G / 4)]           2 bits a group: which of the four
    scales  f16  [.., N, G]

    A group tries all four levels, each with the smallest scale that covers it, and takes the one with the
    least squared error. Relative errors of Gaussian weights: 0.097 at 4 bits in groups of 128 (4.14 with all
    that is stored), 0.206 at 3; 0.084 at 4 bits in groups of 32. Integers of 4 bits with zero points have
    0.100 and 0.081: groups that are small gain more from a zero point.

    Source: BitMoD (Chen et al. 2024, section III), whose scales are integers of 8 bits under one scale a row,
    and which scales by the largest magnitude, whichever side it is on.
    """

    bits: int = 4
    group: int = 128

    name = "bitmod"

    def __post_init__(self) -> None:
        if self.bits not in _POSITIVE:
            raise IRError(f"bitmod has 3 or 4 bits, not {self.bits}")
        if self.group < 8 or self.group % 8:
            raise IRError(f"the group must be a multiple of 8, not {self.group}")

    def describe(self) -> str:
        return f"{self.bits}-bit floats with a level chosen by group, group {self.group}"

    @property
    def fewest_rows(self) -> int:
        return 4 * self.group

    @property
    def tables(self) -> list[list[float]]:
        """The levels, lowest first, of each of the four kinds of a group."""
        positive = _POSITIVE[self.bits]
        plain = [0.0, *positive, *(-level for level in positive)]
        extra = [sign * level for level in _SPECIAL[self.bits] for sign in (1, -1)]
        return [sorted([*plain, level]) for level in extra]

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        lead, groups = shape[:-1], math.ceil(shape[-1] / self.group)
        return {
            "codes": ((*lead, groups, self.bits * self.group // 8), "u8"),
            "special": ((*lead, math.ceil(groups / 4)), "u8"),
            "scales": ((*lead, groups), "f16"),
        }

    def groups(self, rows_RM: Tensor) -> Tensor:
        from ..pack import in_blocks

        return in_blocks(rows_RM, self.group)

    def grid(self, groups_RGB: Tensor) -> dict[str, Tensor]:
        return self._grid(groups_RGB, 1.0)

    def grid_for(self, groups_RGB: Tensor, importance_GB: Tensor) -> dict[str, Tensor]:
        return self._grid(groups_RGB, importance_GB)

    def _grid(self, groups_RGB: Tensor, importance_GB: Tensor | float) -> dict[str, Tensor]:
        import torch

        low, high = groups_RGB.amin(-1, keepdim=True), groups_RGB.amax(-1, keepdim=True)
        best: dict[str, Tensor] = {}
        least = torch.full_like(low, torch.inf)
        for kind, table in enumerate(self.tables):
            scales = torch.maximum(high / table[-1], low / table[0])
            one = {"scales": scales, "special": torch.full_like(scales, kind)}
            settled = self.settle(one)
            off = self.values(self.nearest(groups_RGB, settled), settled) - groups_RGB
            missed = off.square_().mul_(importance_GB).sum(-1, keepdim=True)
            better = missed < least
            least = torch.where(better, missed, least)
            best = {name: torch.where(better, at, best.get(name, at)) for name, at in one.items()}
        return best

    def settle(self, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from ..pack import halved

        return {"scales": halved(grid["scales"]).float(), "special": grid["special"]}

    def nearest(self, groups_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        import torch

        scaled = groups_RGB / grid["scales"].clamp(min=1e-8)
        tables = torch.tensor(self.tables, device=scaled.device)
        between = ((tables[:, 1:] + tables[:, :-1]) / 2)[
            grid["special"].long()
        ]  # [R, G, 1, levels - 1]
        codes = torch.zeros_like(scaled, dtype=torch.uint8)
        for edge in between.unbind(-1):
            codes += scaled > edge
        return codes

    def values(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        return self._levels(codes_RGB, grid["special"]) * grid["scales"]

    def _levels(self, codes: Tensor, special: Tensor) -> Tensor:
        import torch

        flat = torch.tensor(self.tables, device=codes.device).flatten()
        levels: Tensor = flat[(codes.float() + special * (1 << self.bits)).long()]
        return levels

    def pack(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from ..bit_planes import pack_planes
        from ..pack import pack_bits

        return {
            "codes": pack_planes(codes_RGB, self.bits),
            "special": pack_bits(grid["special"].squeeze(-1), 2),
            "scales": grid["scales"].squeeze(-1).half(),
        }

    def dequantize(self, pieces: Mapping[str, Tensor], width: int) -> Tensor:
        from ..bit_planes import unpack_planes
        from ..pack import unpack_bits

        scales = pieces["scales"].float()[..., None]
        special = unpack_bits(pieces["special"], 2, scales.shape[-2]).float()[..., None]
        values = self._levels(unpack_planes(pieces["codes"], self.bits), special) * scales
        return values.flatten(-2)[..., :width]


# As int4, with fewer bytes; at 3 bits nothing is left to tell on a model of 135M parameters.
PRESETS.register(Preset("bitmod", BitMod(), 1.0))
