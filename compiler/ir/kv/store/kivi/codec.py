"""KIVI (Liu et al. 2024): keys by channel, values by token."""

from __future__ import annotations

from torch import Tensor

from ...codes.grouped import (
    decode_by_channel,
    decode_by_token,
    encode_by_channel,
    encode_by_token,
    in_granules,
)
from ...codes.salient import Seen
from ..packed import Pieces
from .storage import Kivi


def encode(storage: Kivi, keys_KTD: Tensor, values_KTD: Tensor, seen: Seen) -> Pieces:
    return codes(storage, in_granules(storage, keys_KTD), in_granules(storage, values_KTD))


def codes(storage: Kivi, keys_KGTD: Tensor, values_KGTD: Tensor) -> Pieces:
    """Codes, scales and zeros of granules."""
    by = encode_by_channel if storage.keys == "channel" else encode_by_token
    keys = by("key", keys_KGTD, storage.key_bits, storage.group)
    return keys | encode_by_token("value", values_KGTD, storage.value_bits, storage.group)


def decode(storage: Kivi, pieces: Pieces) -> tuple[Tensor, Tensor]:
    if storage.keys == "channel":
        keys = decode_by_channel("key", pieces, storage.key_bits, storage.group)
    else:
        keys = decode_by_token("key", pieces, storage.key_bits)
    return keys, decode_by_token("value", pieces, storage.value_bits)
