"""MiKV (Yang et al. 2024): by token in two precisions, keys balanced against the queries' outliers."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codes.grouped import decode_by_token, encode_by_token
from ...codes.salient import Seen, in_parts
from ..packed import Pieces
from .storage import MiKV


def encode(storage: MiKV, keys_KTD: Tensor, values_KTD: Tensor, seen: Seen) -> Pieces:
    keys_KGTD, values_KGTD = in_parts(storage, keys_KTD, values_KTD, seen)
    balance = balancer(keys_KGTD, seen.query_max_KD)
    pieces: Pieces = {"key_balance": balance}
    keys_KGTD = keys_KGTD * balance.float()
    start = 0
    for part, tokens, bits in storage.parts:
        for of, x in (("key", keys_KGTD), ("value", values_KGTD)):
            whole = x[:, :, start : start + tokens]
            pieces |= encode_by_token(f"{part}_{of}", whole, bits, storage.group)
        start += tokens
    return pieces


def decode(storage: MiKV, pieces: Pieces) -> tuple[Tensor, Tensor]:
    keys, values = (
        torch.cat(
            [decode_by_token(f"{part}_{of}", pieces, bits) for part, _, bits in storage.parts], -2
        )
        for of in ("key", "value")
    )
    return keys / pieces["key_balance"].float(), values


def balancer(keys_KGTD: Tensor, query_max_KD: Tensor | None) -> Tensor:
    """b = sqrt(max|q| / max|k|) of each channel, [K, G, 1, D] (section 3.2, equation 4).

    A key's channel times b and a query's over b have the same range, so no channel is rounded to nothing
    where it matters. Without queries every channel of the keys gets the same range.
    """
    largest = keys_KGTD.abs().amax(-2, keepdim=True).clamp(min=1e-4)
    queries = 1.0 if query_max_KD is None else query_max_KD[:, None, None].clamp(min=1e-4)
    return (queries / largest).sqrt().clamp(1e-4, 1e4).half()
