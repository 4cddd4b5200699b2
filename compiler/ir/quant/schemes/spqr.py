"""SpQR: small groups whose scales and zero points are quantized themselves, and a few weights kept apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .....errors import IRError
from ..scheme import PRESETS, SCHEMES, Piece, Preset, Scheme

if TYPE_CHECKING:
    from torch import Tensor

#: Bits of a scale and of a zero point.
_BITS = 3
#: Outliers are chosen in about as many rounds, in each at most one of a group.
_ROUNDS = 4
#: The widest row whose columns an index counts.
_WIDEST = 1 << 16


@SCHEMES.register
@dataclass(frozen=True)
class SpQR(Scheme):
    """Asymmetric integers in groups; scales and zero points of 3 bits; a share of each row in float16.

    codes   u8   [.., N, G, bits * group / 8]    bit planes
    levels  u8   [.., N, S, 2 * 3 * second / 8]  bit planes: scales, then zero points, of `second` groups
    ranges  f16  [.., N, S, 4]                   lowest and step of those scales, lowest and step of the zeros
    index   i16  [.., N, K]                      columns of the outliers, rising; beyond 32767 less 65536
    values  f16  [.., N, K]                      their weights

    w = (q - zero) * scale, scale = lowest + code * step, zero likewise; K = outliers * M, M rounded up to
    groups, but at least 1. A group's range holds 0. Outliers are those whose removal saves their group the
    most squared error, found one by one (section 4.2), each column's error times its importance where a
    solver knows the inputs; exactly K a row. What settles is the second level: it follows
    from scales and zeros where the grid has none, and stands from then on.

    Bits of a weight: bits + 6 / group + 64 / (group * second) + 32 * outliers = 3.95 as it comes. Relative
    error of Gaussian weights: 0.130; where one weight of a hundred is ten times as large 0.100 (integers of 4
    bits in groups of 128: 0.102 and 0.248).

    Source: SpQR (Dettmers et al. 2023, section 4), whose second level runs over 16 rows, here over groups of
    one row, so that rows can be read alone; and whose outliers are as many as pass a threshold.
    """

    bits: int = 3
    group: int = 16
    second: int = 16
    outliers: float = 0.01

    name = "spqr"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise IRError(f"spqr has 2 to 8 bits, not {self.bits}")
        for name in ("group", "second"):
            size = getattr(self, name)
            if size < 8 or size % 8:
                raise IRError(f"{name} must be a multiple of 8, not {size}")
        if not 0 <= self.outliers <= 0.5:
            raise IRError(f"outliers are a share of a row, 0 to 0.5, not {self.outliers}")

    def describe(self) -> str:
        kept = f"{100 * self.outliers:g} % in float16"
        return f"{self.bits} bits, group {self.group}, scales of {_BITS} bits, {kept}"

    @property
    def fewest_rows(self) -> int:
        return 4 * self.group

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        lead, groups = shape[:-1], math.ceil(shape[-1] / self.group)
        if shape[-1] > _WIDEST:
            raise IRError(
                f"spqr counts columns to {_WIDEST}; a row has {shape[-1]}: take another scheme"
            )
        ranges, kept = math.ceil(groups / self.second), self._count(groups * self.group)
        found: dict[str, Piece] = {
            "codes": ((*lead, groups, self.bits * self.group // 8), "u8"),
            "levels": ((*lead, ranges, 2 * _BITS * self.second // 8), "u8"),
            "ranges": ((*lead, ranges, 4), "f16"),
        }
        if kept:
            found |= {"index": ((*lead, kept), "i16"), "values": ((*lead, kept), "f16")}
        return found

    def _count(self, width: int) -> int:
        """Outliers of a padded row."""
        return max(1, round(self.outliers * width)) if self.outliers else 0

    def groups(self, rows_RM: Tensor) -> Tensor:
        from ..pack import in_blocks

        return in_blocks(rows_RM, self.group)

    def grid(self, groups_RGB: Tensor) -> dict[str, Tensor]:
        return self._grid(groups_RGB, None)

    def grid_for(self, groups_RGB: Tensor, importance_GB: Tensor) -> dict[str, Tensor]:
        return self._grid(groups_RGB, importance_GB)

    def _grid(self, groups_RGB: Tensor, importance_GB: Tensor | None) -> dict[str, Tensor]:
        from ..pack import halved

        outlier = self._outliers(groups_RGB, importance_GB)
        scales, zeros = self._range(groups_RGB, outlier)
        exact = halved(groups_RGB * outlier).float()
        return {"scales": scales, "zeros": zeros, "outlier": outlier, "exact": exact}

    def _range(self, groups_RGB: Tensor, outlier: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points of the groups without their outliers, in full precision."""
        rest = groups_RGB.masked_fill(outlier, 0)
        low, high = (
            rest.amin(-1, keepdim=True).clamp(max=0),
            rest.amax(-1, keepdim=True).clamp(min=0),
        )
        scales = (high - low) / ((1 << self.bits) - 1)
        return scales, -low / scales.clamp(min=1e-8)

    def _missed(self, groups_RGB: Tensor, outlier: Tensor, importance_GB: Tensor | None) -> Tensor:
        """The squared error of each group beside its outliers, [R, G]."""
        scales, zeros = self._range(groups_RGB, outlier)
        codes = self._codes(groups_RGB, scales, zeros)
        off = (codes - zeros) * scales - groups_RGB
        each: Tensor = off.masked_fill_(outlier, 0).square_()
        return each.sum(-1) if importance_GB is None else each.mul_(importance_GB).sum(-1)

    def _outliers(self, groups_RGB: Tensor, importance_GB: Tensor | None) -> Tensor:
        import torch

        outlier = torch.zeros_like(groups_RGB, dtype=torch.bool)
        groups = groups_RGB.shape[1]
        total = left = self._count(groups * self.group)
        while left:
            count = min(left, groups, math.ceil(total / _ROUNDS))
            left -= count
            largest = groups_RGB.abs().masked_fill(outlier, -1).argmax(-1, keepdim=True)
            without = outlier.scatter(-1, largest, True)
            saved = self._missed(groups_RGB, outlier, importance_GB)
            saved = saved - self._missed(groups_RGB, without, importance_GB)
            best = saved.topk(count, dim=1).indices
            gains = torch.zeros_like(saved, dtype=torch.bool).scatter(1, best, True)
            outlier = torch.where(gains[..., None], without, outlier)
        return outlier

    def settle(self, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = dict(grid)
        for name in ("scales", "zeros"):
            if f"{name}_step" not in found:
                found |= self._second(found[name], name)
            low, step = found[f"{name}_low"], found[f"{name}_step"]
            found[name] = low + self._level(found[name], low, step) * step
        return found

    def _second(self, numbers_RG1: Tensor, name: str) -> dict[str, Tensor]:
        """Lowest and step, for each group the same in all groups of a second-level one."""
        import torch

        from ..pack import halved

        groups = numbers_RG1.shape[1]
        last = numbers_RG1[:, -1:].expand(-1, -groups % self.second, -1)
        by_second = torch.cat([numbers_RG1, last], dim=1).unflatten(1, (-1, self.second))
        low = halved(by_second.amin(2, keepdim=True)).float()
        step = halved(
            (by_second.amax(2, keepdim=True) - low).clamp(min=0) / ((1 << _BITS) - 1)
        ).float()
        found = {f"{name}_low": low, f"{name}_step": step}
        return {
            label: at.expand_as(by_second).flatten(1, 2)[:, :groups] for label, at in found.items()
        }

    def _level(self, numbers: Tensor, low: Tensor, step: Tensor) -> Tensor:
        return ((numbers - low) / step.clamp(min=1e-8)).round_().clamp_(0, (1 << _BITS) - 1)

    def _codes(self, groups_RGB: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        codes = groups_RGB / scales.clamp(min=1e-8) + zeros
        return codes.round_().clamp_(0, (1 << self.bits) - 1)

    def nearest(self, groups_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        return self._codes(groups_RGB, grid["scales"], grid["zeros"]).masked_fill_(
            grid["outlier"], 0
        )

    def values(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        import torch

        dense = (codes_RGB - grid["zeros"]) * grid["scales"]
        return torch.where(grid["outlier"], grid["exact"], dense)

    def pack(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        from ..bit_planes import pack_planes
        from ..pack import in_blocks

        levels, ranges = [], []
        for name in ("scales", "zeros"):
            low, step = grid[f"{name}_low"], grid[f"{name}_step"]
            level = in_blocks(self._level(grid[name], low, step).squeeze(-1), self.second)
            levels.append(pack_planes(level, _BITS))
            ranges += [at[:, :: self.second, 0].half() for at in (low, step)]
        found = {
            "codes": pack_planes(codes_RGB, self.bits),
            "levels": torch.cat(levels, dim=-1),
            "ranges": torch.stack(ranges, dim=-1),
        }
        if self.outliers:
            outlier = grid["outlier"].flatten(1)
            index = outlier.nonzero()[:, 1].view(len(outlier), -1)
            wrapped = index - _WIDEST * (index >= _WIDEST // 2)
            found["index"] = wrapped.to(torch.int16)
            found["values"] = grid["exact"].flatten(1).gather(1, index).half()
        return found

    def dequantize(self, pieces: Mapping[str, Tensor], width: int) -> Tensor:
        from ..bit_planes import unpack_planes

        codes = unpack_planes(pieces["codes"], self.bits)
        ranges = pieces["ranges"].float()[..., None]  # [.., S, 4, 1]
        found = []
        for at, levels in enumerate(pieces["levels"].chunk(2, dim=-1)):
            low, step = ranges[..., 2 * at, :], ranges[..., 2 * at + 1, :]
            numbers = (low + unpack_planes(levels, _BITS) * step).flatten(-2)
            found.append(numbers[..., : codes.shape[-2], None])
        scales, zeros = found
        dense = ((codes - zeros) * scales).flatten(-2)
        if self.outliers:
            index = pieces["index"].int()
            index = index + _WIDEST * (index < 0).int()
            dense = dense.scatter(-1, index.long(), pieces["values"].float())
        return dense[..., :width]


PRESETS.register(
    Preset("spqr", SpQR(), 1.4)
)  # 3 bits: within what tells a model from another, an estimate
