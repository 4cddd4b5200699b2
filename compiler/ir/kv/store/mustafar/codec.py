"""Mustafar (Joo et al. 2025): numbers by magnitude, and a bitmap of their channels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codes.affine import narrowed
from ...codes.bits import pack, unpack
from ...codes.grouped import in_granules
from ...codes.salient import Seen
from ..packed import Pieces
from .storage import Mustafar, kept_of

#: The largest code of a byte, and what codes are stored with.
_LARGEST, _OFFSET = 127, 128


def encode(storage: Mustafar, keys_KTD: Tensor, values_KTD: Tensor, seen: Seen) -> Pieces:
    pieces: Pieces = {}
    for x_KTD, (part, sparsity) in zip((keys_KTD, values_KTD), storage.parts, strict=True):
        x = in_granules(storage, x_KTD)
        largest = x.abs().topk(kept_of(x.shape[-1], sparsity), dim=-1, sorted=False).indices
        channels = largest.sort(dim=-1).values
        bits = torch.zeros_like(x, dtype=torch.uint8).scatter_(-1, channels, 1)
        (pieces[f"{part}_bitmap"],) = pack(bits, 1)
        pieces |= _kept(storage, part, x.gather(-1, channels))
    return pieces


def decode(storage: Mustafar, pieces: Pieces) -> tuple[Tensor, Tensor]:
    keys, values = (_decoded(storage, part, pieces) for part, _ in storage.parts)
    return keys, values


def _kept(storage: Mustafar, part: str, kept: Tensor) -> Pieces:
    if storage.dtype == "f16":
        return {f"{part}_kept": narrowed(kept, torch.float16)}
    scale = narrowed(kept.abs().amax(-1, keepdim=True) / _LARGEST, torch.float16)
    steps = kept / scale.float().clamp(min=torch.finfo(torch.float16).tiny * 2**-10)
    codes = steps.round().clamp(-_LARGEST, _LARGEST) + _OFFSET
    return {f"{part}_kept": codes.to(torch.uint8), f"{part}_scale": scale}


def _decoded(storage: Mustafar, part: str, pieces: Pieces) -> Tensor:
    kept: Tensor = pieces[f"{part}_kept"].float()
    if storage.dtype == "i8":
        kept = (kept - _OFFSET) * pieces[f"{part}_scale"].float()
    bits = unpack([pieces[f"{part}_bitmap"]], 1).long()
    # A channel's number stands behind those of the channels in front of it that are kept.
    place = (bits.cumsum(-1) - 1).clamp(0, kept.shape[-1] - 1)
    return kept.gather(-1, place) * bits
