"""Codes of 2, 3, 4 or 8 bits in bytes, without a bit of waste.

A code is cut into *planes* of 1, 2, 4 or 8 bits, widths that divide a byte: 3 bits are a plane of 2 and a
plane of 1, so that 8 codes take 3 bytes and none of them straddles two. A plane's byte j holds the codes
j * n .. j * n + n - 1, the first in its lowest bits; the planes of an axis stand one behind the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: (bits of a plane, how far its bits stand from the code's lowest) by the bits of a code.
PLANES = {2: ((2, 0),), 3: ((2, 0), (1, 2)), 4: ((4, 0),), 8: ((8, 0),)}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs the last axis, a multiple of 8: [.., n] codes below 2**bits to [.., n * bits / 8] bytes (u8)."""
    packed = []
    for width, above in PLANES[bits]:
        each = 8 // width
        plane = (codes.to(torch.int32) >> above) & (2**width - 1)
        shifts = width * torch.arange(each, device=codes.device, dtype=torch.int32)
        parts = plane.unflatten(-1, (-1, each)) << shifts
        packed.append(parts.sum(-1).to(torch.uint8))
    return torch.cat(packed, dim=-1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """What `pack` was given, as u8."""
    total = packed.shape[-1] * 8 // bits
    codes, start = torch.zeros((), dtype=torch.uint8, device=packed.device), 0
    for width, above in PLANES[bits]:
        each = 8 // width
        part = packed[..., start : start + total // each, None]
        shifts = width * torch.arange(each, device=packed.device, dtype=torch.uint8)
        plane = ((part >> shifts) & (2**width - 1)).flatten(-2)
        codes = codes | (plane << above)
        start += total // each
    return codes
