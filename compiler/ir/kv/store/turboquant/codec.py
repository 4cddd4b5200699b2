"""TurboQuant (Zandieh et al. 2025): a scale a token, and levels that are the same for all."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codes.affine import narrowed
from ...codes.codec import through_arrays
from ...codes.grouped import in_granules, pack_codes, unpack_codes
from ...codes.normal import levels, nearest
from ...codes.salient import Seen
from ..packed import Pieces
from .storage import TurboQuant


def encode(storage: TurboQuant, keys_KTD: Tensor, values_KTD: Tensor, seen: Seen) -> Pieces:
    if storage.even:
        return through_arrays(storage, keys_KTD, values_KTD)
    keys_KGTD, values_KGTD = (in_granules(storage, x) for x in (keys_KTD, values_KTD))
    mean = narrowed(keys_KGTD.mean(2, keepdim=True), torch.float16)
    pieces = {"key_mean": mean}
    pieces |= _encoded("key", keys_KGTD - mean.float(), storage.key_bits)
    return pieces | _encoded("value", values_KGTD, storage.value_bits)


def decode(storage: TurboQuant, pieces: Pieces) -> tuple[Tensor, Tensor]:
    keys = _decoded(storage, "key", pieces, storage.key_bits) + pieces["key_mean"].float()
    return keys, _decoded(storage, "value", pieces, storage.value_bits)


def _encoded(part: str, x: Tensor, bits: int) -> Pieces:
    """Codes of numbers over their token's root mean square, and the scale that is best for these codes."""
    root = x.square().mean(-1, keepdim=True).sqrt()
    codes = nearest(x / root.clamp(min=torch.finfo(torch.float32).tiny), bits)
    level = levels(bits).to(x.device)[codes.long()]
    scale = (x * level).sum(-1, keepdim=True) / level.square().sum(-1, keepdim=True)
    return pack_codes(part, codes, bits) | {f"{part}_scale": narrowed(scale, torch.float16)}


def _decoded(storage: TurboQuant, part: str, pieces: Pieces, bits: int) -> Tensor:
    codes = unpack_codes(part, pieces, bits)
    scale: Tensor = pieces[f"{part}_scale"].float()
    if storage.even:
        places: Tensor = codes.float() - (2**bits - 1) / 2
        return places * scale
    return levels(bits).to(codes.device)[codes.long()] * scale
