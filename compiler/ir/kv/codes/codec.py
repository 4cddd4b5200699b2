"""Packing and unpacking by whatever storage a group has."""

from __future__ import annotations

from torch import Tensor

from ..store.packed import Packed, Pieces
from ..store.storage import GroupShape
from .salient import Seen

__all__ = ["Seen", "decode", "encode"]


def encode(storage: Packed, keys_KTD: Tensor, values_KTD: Tensor, seen: Seen) -> Pieces:
    """Packs whole granules of tokens: the storage's pieces in their order, each [K, G, R, W].

    Where the storage keeps salient tokens in more bits, these are the ones of all the tokens given that got
    the most attention; the others' order is kept.
    """
    pieces = storage.codec.encode(storage, keys_KTD, values_KTD, seen)
    shape = GroupShape(keys_KTD.shape[0], keys_KTD.shape[2], values_KTD.shape[2])
    return {piece.name: pieces[piece.name] for piece in storage.pieces(shape)}


def decode(storage: Packed, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Keys and values [.., G, T, D] of pieces [.., G, R, W]; mixed storages order tokens in their way."""
    return storage.codec.decode(storage, pieces)
