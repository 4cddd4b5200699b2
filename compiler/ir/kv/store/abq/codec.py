"""Accurate Block Quantization (Trukhanov & Soloveychik 2024): mantissas times powers of two."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codes.block_float import EXPONENT_AT
from ...codes.codec import through_arrays
from ...codes.grouped import unpack_codes
from ...codes.salient import Seen
from ..packed import Pieces
from .storage import Abq


def encode(storage: Abq, keys_KTD: Tensor, values_KTD: Tensor, seen: Seen) -> Pieces:
    return through_arrays(storage, keys_KTD, values_KTD)


def decode(storage: Abq, pieces: Pieces) -> tuple[Tensor, Tensor]:
    keys, values = (_decoded(part, pieces, bits) for part, bits in storage.parts)
    return keys, values


def _decoded(part: str, pieces: Pieces, bits: int) -> Tensor:
    mantissa = unpack_codes(part, pieces, bits).float() - 2 ** (bits - 1)
    exponent: Tensor = pieces[f"{part}_exponent"]
    # A float32 whose mantissa is 0 is 2 to its exponent.
    step = (exponent.int() << EXPONENT_AT).view(torch.float32)
    numbers: Tensor = mantissa.unflatten(-1, (step.shape[-1], -1)) * step[..., None]
    return numbers.flatten(-2)
