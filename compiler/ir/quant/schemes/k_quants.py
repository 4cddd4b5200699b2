"""Integers in short groups, whose scales and minimums are codes themselves: llama.cpp's K-quants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .....errors import IRError
from ..scheme import PRESETS, SCHEMES, Piece, Preset, Scheme

if TYPE_CHECKING:
    from torch import Tensor

#: Weights of a row that share a unit of scales, and one of minimums.
SUPERBLOCK = 256

#: The smallest unit: so many steps of float16 that rounding it moves no largest scale to another code.
_LEAST = 2.0**-18


class Kind(NamedTuple):
    """Weights that share a scale, the bits of its code, and whether there are minimums."""

    block: int
    scale_bits: int
    minimums: bool


KINDS = {
    2: Kind(16, 4, True),
    3: Kind(16, 6, False),
    4: Kind(32, 6, True),
    5: Kind(32, 6, True),
    6: Kind(16, 8, False),
}

#: Codes lie in a plane of high bits and, where these are no whole part of a byte, one of low bits.
PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0)}


@SCHEMES.register
@dataclass(frozen=True)
class KQuant(Scheme):
    """Codes of `bits` bits; rows are padded to whole numbers of 256 weights.

    2, 4, 5 bits: w = u s q - v m, with codes s of a scale and m of a minimum for 16 or 32 weights.
    3, 6 bits:    w = u s (q - 2^(bits-1)), with codes s that have a sign.

    packed, low            uint8 [.., N, G, ..]   q, in planes as those of `grouped`
    scales, low_scales     uint8 [.., N, ..]      s, likewise; those with a sign have half their range added
    mins, low_mins         uint8 [.., N, ..]      m
    units, min_units       f16   [.., N, S]       u, v, for 256 weights

    2.63, 3.44, 4.5, 5.5 and 6.56 bits a weight, as many as a GGUF has for them. Rounded to nearest, a group
    is spread over its range; llama.cpp searches for scales, and has a smaller error.

    Source: ggml's block formats Q2_K to Q6_K (llama.cpp, ggml-common.h).
    """

    bits: int = 4

    name = "kquant"

    def __post_init__(self) -> None:
        if self.bits not in KINDS:
            raise IRError(f"K-quants have {', '.join(map(str, KINDS))} bits, not {self.bits}")

    @property
    def kind(self) -> Kind:
        return KINDS[self.bits]

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        return self.kind.block

    @property
    def high_bits(self) -> int:
        """Bits of a code that lie in `packed`."""
        return PLANES[self.bits][0]

    @property
    def low_bits(self) -> int:
        """Bits of a code that lie in `low`."""
        return PLANES[self.bits][1]

    def describe(self) -> str:
        return f"Q{self.bits}_K: {self.bits} bits, block {self.block}"

    @property
    def fewest_rows(self) -> int:
        return 4 * self.block

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        lead, supers = shape[:-1], math.ceil(shape[-1] / SUPERBLOCK)
        block, scale_bits, minimums = self.kind
        groups = supers * SUPERBLOCK // block
        found: dict[str, Piece] = {
            name: ((*lead, groups, block * bits // 8), "u8")
            for name, bits in zip(("packed", "low"), PLANES[self.bits], strict=True)
            if bits
        }
        for name, unit in (("scales", "units"), ("mins", "min_units"))[: 1 + minimums]:
            found |= {
                plane: ((*lead, groups * bits // 8), "u8")
                for plane, bits in zip((name, f"low_{name}"), PLANES[scale_bits], strict=True)
                if bits
            }
            found[unit] = ((*lead, supers), "f16")
        return found

    def groups(self, rows_RM: Tensor) -> Tensor:
        from ..pack import in_blocks

        whole = in_blocks(rows_RM, SUPERBLOCK).flatten(1)
        return in_blocks(whole, self.block)

    def grid(self, groups_RGB: Tensor) -> dict[str, Tensor]:
        import torch

        low, high = groups_RGB.amin(-1, keepdim=True), groups_RGB.amax(-1, keepdim=True)
        if not self.kind.minimums:
            return {"scales": torch.where(high > -low, high, low) / -self.middle}
        low, high = low.clamp(max=0), high.clamp(min=0)
        return {"scales": (high - low) / ((1 << self.bits) - 1), "mins": -low}

    @property
    def middle(self) -> int:
        """The code of 0 where there are no minimums, and nothing where there are."""
        return 0 if self.kind.minimums else 1 << (self.bits - 1)

    @property
    def _most(self) -> int:
        """The largest code of a scale."""
        return (1 << self.kind.scale_bits - (not self.kind.minimums)) - 1

    def settle(self, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: self._meant(*self._coded(each[..., 0], name))[..., None]
            for name, each in grid.items()
        }

    def _coded(self, numbers_RG: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Scales or minimums as codes [R, G], no scale as 0, and their units [R, S] in float16."""
        import torch

        each = SUPERBLOCK // self.block
        wide = numbers_RG.unflatten(-1, (-1, each))
        units = (wide.abs().amax(-1) / self._most).clamp(_LEAST, 65504.0).half()
        codes = (wide / units.float()[..., None]).round_().clamp_(-self._most, self._most)
        if name == "scales":
            codes = torch.where(codes == 0, torch.where(wide < 0, -1.0, 1.0), codes)
        return codes.flatten(1), units

    def _meant(self, codes: Tensor, units: Tensor) -> Tensor:
        """The scales or minimums [.., G] that codes stand for."""
        return codes * units.float().repeat_interleave(SUPERBLOCK // self.block, dim=-1)

    def nearest(self, groups_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        above = groups_RGB + grid["mins"] if self.kind.minimums else groups_RGB
        codes = (above / grid["scales"]).add_(self.middle)
        return codes.round_().clamp_(0, (1 << self.bits) - 1)

    def values(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        found = (codes_RGB.float() - self.middle) * grid["scales"]
        return found - grid["mins"] if self.kind.minimums else found

    def pack(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        coded = {name: self._coded(each[..., 0], name) for name, each in grid.items()}
        return self.of_codes(codes_RGB, coded["scales"], coded.get("mins"))

    def of_codes(
        self,
        codes_RGB: Tensor,
        scales: tuple[Tensor, Tensor],
        mins: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The pieces, from codes and from the codes [R, G] and units [R, S] of scales and minimums."""
        from ..pack import pack_planes

        planes = PLANES[self.kind.scale_bits]
        found = pack_planes(codes_RGB, *PLANES[self.bits], ("packed", "low"))
        signed = scales[0] + self.added
        found |= pack_planes(signed, *planes, ("scales", "low_scales")) | {"units": scales[1]}
        if mins is not None:
            found |= pack_planes(mins[0], *planes, ("mins", "low_mins")) | {"min_units": mins[1]}
        return found

    @property
    def added(self) -> int:
        """What is added to codes of scales that have a sign."""
        return 0 if self.kind.minimums else 1 << (self.kind.scale_bits - 1)

    def dequantize(self, pieces: Mapping[str, Tensor], width: int) -> Tensor:
        scales = self._meant(self._unpacked(pieces, "scales") - self.added, pieces["units"])
        grid = {"scales": scales[..., None]}
        if self.kind.minimums:
            mins = self._meant(self._unpacked(pieces, "mins"), pieces["min_units"])
            grid["mins"] = mins[..., None]
        codes = _planes(pieces, ("packed", "low"), self.bits, self.block)
        return self.values(codes, grid).flatten(-2)[..., :width]

    def _unpacked(self, pieces: Mapping[str, Tensor], name: str) -> Tensor:
        groups = pieces["units"].shape[-1] * SUPERBLOCK // self.block
        return _planes(pieces, (name, f"low_{name}"), self.kind.scale_bits, groups).float()


def _planes(pieces: Mapping[str, Tensor], names: tuple[str, str], bits: int, count: int) -> Tensor:
    from ..pack import unpack_bits, unpack_planes

    high, low = PLANES[bits]
    if not low:
        return unpack_bits(pieces[names[0]], high, count)
    return unpack_planes(pieces[names[0]], pieces[names[1]], high, low, count)


PRESETS.register(Preset("kquant", KQuant(), 1.0))  # as int4
