"""ZipCache (He et al. 2024): keys by channel, values by token and channel-separable, in two precisions."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codes.grouped import (
    decode_by_channel,
    decode_by_token,
    encode_by_channel,
    encode_by_token,
)
from ...codes.salient import Seen, in_parts
from ..packed import Pieces
from .storage import ZipCache


def encode(storage: ZipCache, keys_KTD: Tensor, values_KTD: Tensor, seen: Seen) -> Pieces:
    keys_KGTD, values_KGTD = in_parts(storage, keys_KTD, values_KTD, seen)
    norm = values_KGTD.abs().amax(-2, keepdim=True).sqrt().clamp(1e-4, 250.0).half()
    pieces: Pieces = {"value_norm": norm}
    start = 0
    for part, tokens, bits in storage.parts:
        keys, values = (x[:, :, start : start + tokens] for x in (keys_KGTD, values_KGTD))
        pieces |= encode_by_channel(f"{part}_key", keys, bits, tokens)
        values = values / norm.float()
        pieces |= encode_by_token(f"{part}_value", values, bits, values.shape[-1])
        start += tokens
    return pieces


def decode(storage: ZipCache, pieces: Pieces) -> tuple[Tensor, Tensor]:
    keys, values = [], []
    for part, tokens, bits in storage.parts:
        keys.append(decode_by_channel(f"{part}_key", pieces, bits, tokens))
        values.append(decode_by_token(f"{part}_value", pieces, bits))
    return torch.cat(keys, -2), torch.cat(values, -2) * pieces["value_norm"].float()
