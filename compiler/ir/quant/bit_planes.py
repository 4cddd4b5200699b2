"""Codes of any number of bits, one bit of all of them after the other.

`bits` planes of B codes take bits * B / 8 bytes, whatever the bits: unlike `pack_bits`, that needs no bits
that divide 8.
    plane k    uint8 [.., B / 8]    bit k of every code, the most significant plane first; within a byte the
                                    code of lowest index is the lowest bit
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pack import pack_bits


def planes_of(codes: Tensor, bits: int) -> list[Tensor]:
    """The planes, uint8 [.., B / 8] each, of integers 0..2^bits-1 [.., B]; B is a multiple of 8."""
    whole = codes.to(torch.int32)
    return [pack_bits((whole >> bit) & 1, 1) for bit in reversed(range(bits))]


def from_planes(planes: list[Tensor]) -> Tensor:
    """The integers [.., B] that planes [.., B / 8] make, in float32: exact up to 24 planes."""
    # In floats, which every target has; a byte over a power of two is exact.
    halves = torch.tensor([2.0**-bit for bit in range(8)], device=planes[0].device)
    codes: Tensor | None = None
    for plane in planes:
        shifted = plane.float()[..., None] * halves
        bits = shifted.floor() - (shifted / 2).floor() * 2
        codes = bits if codes is None else codes * 2 + bits
    assert codes is not None
    return codes.flatten(-2)


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """All planes in one tensor, uint8 [.., bits * B / 8]."""
    return torch.cat(planes_of(codes, bits), dim=-1)


def unpack_planes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_planes`, in float32."""
    return from_planes(list(packed.chunk(bits, dim=-1)))
