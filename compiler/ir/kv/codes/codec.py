"""Encoding and decoding by storage; each method's own mathematics stands in a file of its name."""

from __future__ import annotations

from torch import Tensor

from ..store.gear import codec as gear
from ..store.gear.storage import Gear
from ..store.kivi import codec as kivi
from ..store.kivi.storage import Kivi
from ..store.mikv import codec as mikv
from ..store.minicache import codec as minicache
from ..store.minicache.storage import MiniCache
from ..store.mixed import MiKV, Mixed, ZipCache
from ..store.packed import Packed
from ..store.storage import GroupShape
from ..store.zipcache import codec as zipcache
from .grouped import Pieces
from .salient import Seen, chosen_first

__all__ = ["Seen", "decode", "encode"]


def encode(storage: Packed, keys_KTD: Tensor, values_KTD: Tensor, seen: Seen) -> Pieces:
    """Packs whole granules of tokens: the storage's pieces by name, each [K, G, R, W].

    Where the storage keeps salient tokens in more bits, these are the ones of all the tokens given that got
    the most attention; the others' order is kept.
    """
    if isinstance(storage, Mixed):
        order_KT = chosen_first(storage, seen, keys_KTD)
        index = order_KT[:, :, None]
        keys_KTD = keys_KTD.gather(1, index.expand(-1, -1, keys_KTD.shape[2]))
        values_KTD = values_KTD.gather(1, index.expand(-1, -1, values_KTD.shape[2]))
    keys, values = (x.float().unflatten(1, (-1, storage.granule)) for x in (keys_KTD, values_KTD))
    pieces = _encoded(storage, keys, values, seen)
    shape = GroupShape(keys.shape[0], keys.shape[-1], values.shape[-1])
    return {piece.name: pieces[piece.name] for piece in storage.pieces(shape)}


def _encoded(storage: Packed, keys: Tensor, values: Tensor, seen: Seen) -> Pieces:
    if isinstance(storage, Gear):
        return gear.encode(storage, keys, values)
    if isinstance(storage, Kivi):
        return kivi.encode(storage, keys, values)
    if isinstance(storage, ZipCache):
        return zipcache.encode(storage, keys, values)
    assert isinstance(storage, MiKV)
    return mikv.encode(storage, keys, values, seen)


def decode(storage: Packed, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Keys and values [.., G, T, D] of pieces [.., G, R, W]; mixed storages order tokens in their way."""
    if isinstance(storage, Gear):
        return gear.decode(storage, pieces)
    if isinstance(storage, Kivi):
        return kivi.decode(storage, pieces)
    if isinstance(storage, ZipCache):
        return zipcache.decode(storage, pieces)
    if isinstance(storage, MiniCache):
        return minicache.decode(storage, pieces)
    assert isinstance(storage, MiKV)
    return mikv.decode(storage, pieces)
