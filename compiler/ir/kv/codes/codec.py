"""Packing and unpacking by whatever storage a group has."""

from __future__ import annotations

import torch
from torch import Tensor

from ..store.packed import Packed, Pieces
from ..store.storage import GroupShape
from .salient import Seen

__all__ = ["Seen", "decode", "encode", "through_arrays"]


def encode(storage: Packed, keys_KTD: Tensor, values_KTD: Tensor, seen: Seen) -> Pieces:
    """Packs whole granules of tokens: the storage's pieces in their order, each [K, G, R, W].

    Where the storage keeps salient tokens in more bits, these are the ones of all the tokens given that got
    the most attention; the others' order is kept.
    """
    pieces = storage.codec.encode(storage, keys_KTD, values_KTD, seen)
    shape = GroupShape(keys_KTD.shape[0], keys_KTD.shape[2], values_KTD.shape[2])
    return {piece.name: pieces[piece.name] for piece in storage.pieces(shape)}


def through_arrays(storage: Packed, keys_KTD: Tensor, values_KTD: Tensor) -> Pieces:
    """What the storage packs in NumPy of tensors on any device, so that every runtime has the same codes."""
    arrays = (x.float().cpu().numpy() for x in (keys_KTD, values_KTD))
    found = storage.arrays.encode(storage, *arrays)
    return {name: torch.from_numpy(piece).to(keys_KTD.device) for name, piece in found.items()}


def decode(storage: Packed, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Keys and values [.., G, T, D] of pieces [.., G, R, W]; mixed storages order tokens in their way."""
    return storage.codec.decode(storage, pieces)
