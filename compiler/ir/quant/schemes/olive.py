"""OliVe: a weight beside an outlier gives up its code, so that the outlier fits into four bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .....errors import IRError
from ..scheme import PRESETS, SCHEMES, Piece, Preset, Scheme

if TYPE_CHECKING:
    from torch import Tensor

#: The code that says: I am a victim, and stand for 0; the other one of my pair is an outlier.
_VICTIM = 8
#: Magnitudes of outliers by their code: abfloat E2M1 of bias 2, (2 + m) << (e + 2); its first code would be
#: the victim's with a sign, and stands for nothing.
_OUTLIERS = (0.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0)
_NORMALS = tuple(float(code if code < _VICTIM else code - 16) for code in range(16))
#: What a code stands for: as a normal weight, then beside a victim.
_LEVELS = (
    *_NORMALS[:_VICTIM],
    0.0,
    *_NORMALS[_VICTIM + 1 :],
    *_OUTLIERS,
    *(-level for level in _OUTLIERS),
)
#: Scales that are tried, as shares of the one at which the largest weight of a group is normal: a coarse
#: search down to that at which it is the largest outlier, and a finer one around the best.
_COARSE = tuple(2.0 ** -(step / 2) for step in range(10))
_FINE = (0.9, 1.1)


@SCHEMES.register
@dataclass(frozen=True)
class Olive(Scheme):
    """Codes of 4 bits in pairs, one scale for `group` weights of a row.

    codes   u8   [.., N, G, group / 2]   4 bits, low ones first
    scales  f16  [.., N, G]

    Of a pair neither is an outlier, and both codes are integers -7 to 7; or one is a victim, code 8, which
    stands for 0, and the other an outlier in abfloat: +-12, 16, 24, 32, 48, 64 or 96 scales. Each pair takes
    what costs least, and each group the scale that does. So a group with outliers keeps the fine scale of its
    other weights; without any it is a little behind integers, which have a 16th level. Relative error of
    Gaussian weights, group 128, 4.13 bits: 0.105 (integers: 0.102); where one weight of a hundred is ten
    times as large, 0.106 (integers: 0.248).

    Source: OliVe (Guo et al. 2023, section 3), which finds outliers by a threshold, starting from three
    standard deviations, has one scale for a tensor or a row, and quantizes activations too.
    """

    group: int = 128

    name = "olive"
    by_itself = False

    def __post_init__(self) -> None:
        if self.group < 2 or self.group % 2:
            raise IRError(f"the group must be a multiple of 2, not {self.group}")

    def describe(self) -> str:
        return f"outlier-victim pairs, 4 bits, group {self.group}"

    @property
    def fewest_rows(self) -> int:
        return 4 * self.group

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        lead, groups = shape[:-1], math.ceil(shape[-1] / self.group)
        return {
            "codes": ((*lead, groups, self.group // 2), "u8"),
            "scales": ((*lead, groups), "f16"),
        }

    def groups(self, rows_RM: Tensor) -> Tensor:
        from ..pack import in_blocks

        return in_blocks(rows_RM, self.group)

    def grid(self, groups_RGB: Tensor) -> dict[str, Tensor]:
        import torch

        top = groups_RGB.abs().amax(-1, keepdim=True) / 7
        best, least = top, torch.full_like(top, torch.inf)
        for shares in (_COARSE, _FINE):
            center = best
            for share in shares:
                scales = self.settle({"scales": center * share})["scales"]
                missed = self._cheapest(groups_RGB, scales)[1].sum((-2, -1))[..., None]
                best = torch.where(missed < least, scales, best)
                least = torch.minimum(missed, least)
        return {"scales": best}

    def settle(self, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from ..pack import halved

        return {"scales": halved(grid["scales"]).float()}

    def nearest(self, groups_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        return self._cheapest(groups_RGB, grid["scales"])[0].flatten(-2)

    def _cheapest(self, groups_RGB: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of pairs, uint8 [R, G, B/2, 2], and their squared errors [R, G, B/2, 1]."""
        import torch

        pairs = (groups_RGB / scales.clamp(min=1e-8)).unflatten(-1, (-1, 2))
        sizes = pairs.abs()
        normal = pairs.round().clamp_(-7, 7)
        levels = torch.tensor(_OUTLIERS[1:], device=pairs.device)
        outlier = torch.bucketize(sizes, (levels[1:] + levels[:-1]) / 2)
        as_outlier = (levels[outlier] - sizes).square()
        # Of each weight: what it costs that it is an outlier and the other its victim.
        alone = as_outlier + pairs.square().flip(-1)
        both = (pairs - normal).square().sum(-1, keepdim=True)
        least, at = alone.min(-1, keepdim=True)
        paired = least < both
        is_outlier = torch.arange(2, device=pairs.device) == at
        beside = torch.where(is_outlier, outlier + 1 + _VICTIM * (pairs < 0), _VICTIM)
        codes = torch.where(paired, beside, normal.long() % 16)
        return codes.to(torch.uint8), torch.where(paired, least, both) * scales[..., None].square()

    def values(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        return self._levels(codes_RGB) * grid["scales"]

    def _levels(self, codes: Tensor) -> Tensor:
        import torch

        pairs = codes.float().unflatten(-1, (-1, 2))
        beside = (pairs.flip(-1) == _VICTIM).float()
        levels: Tensor = torch.tensor(_LEVELS, device=codes.device)[(pairs + 16 * beside).long()]
        return levels.flatten(-2)

    def pack(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from ..pack import pack_bits

        return {"codes": pack_bits(codes_RGB, 4), "scales": grid["scales"].squeeze(-1).half()}

    def dequantize(self, pieces: Mapping[str, Tensor], width: int) -> Tensor:
        from ..pack import unpack_bits

        levels = self._levels(unpack_bits(pieces["codes"], 4, self.group))
        return (levels * pieces["scales"].float()[..., None]).flatten(-2)[..., :width]


PRESETS.register(Preset("olive", Olive(), 1.0))  # as int4
