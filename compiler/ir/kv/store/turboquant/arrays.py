"""TurboQuant with even levels, packed in NumPy: an artifact for onnxruntime runs without torch."""

from __future__ import annotations

import numpy as np

from ...codes.even import Floats, narrowed, packed, rounded
from ..packed import Pieces, planes
from .storage import TurboQuant


def encode(storage: TurboQuant, keys_KTD: Floats, values_KTD: Floats) -> Pieces:
    """The pieces of whole granules of tokens."""
    keys_KGTD, values_KGTD = (
        x.reshape(x.shape[0], -1, storage.granule, x.shape[2]) for x in (keys_KTD, values_KTD)
    )
    mean = narrowed(keys_KGTD.mean(2, keepdims=True))
    pieces: Pieces = {"key_mean": mean}
    pieces |= _encoded("key", keys_KGTD - mean.astype(np.float32), storage.key_bits)
    return pieces | _encoded("value", values_KGTD, storage.value_bits)


def _encoded(part: str, x: Floats, bits: int) -> Pieces:
    codes, scale = rounded(x, bits)
    names = [name for name, _ in planes(part, bits)]
    found: Pieces = dict(zip(names, packed(codes, bits), strict=True))
    return found | {f"{part}_scale": narrowed(scale)}
