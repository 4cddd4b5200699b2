"""Accurate Block Quantization, packed in NumPy, so that every runtime has the same codes."""

from __future__ import annotations

from ...codes.block_float import rounded
from ...codes.even import Floats, packed
from ..packed import Pieces, planes
from .storage import Abq


def encode(storage: Abq, keys_KTD: Floats, values_KTD: Floats) -> Pieces:
    """The pieces of whole granules of tokens."""
    pieces: Pieces = {}
    for x_KTD, (part, bits) in zip((keys_KTD, values_KTD), storage.parts, strict=True):
        heads, _, size = x_KTD.shape
        blocks = x_KTD.reshape(heads, -1, storage.tokens, size // storage.block, storage.block)
        codes, exponents = rounded(blocks, bits)
        names = [name for name, _ in planes(part, bits)]
        whole = codes.reshape(*blocks.shape[:3], size)
        pieces |= dict(zip(names, packed(whole, bits), strict=True))
        pieces[f"{part}_exponent"] = exponents[..., 0]
    return pieces
