"""Slots of codes as numbers and back, between steps: of arrays of NumPy as of torch.

Slots of int8 hold codes -128 to 127; those of bytes hold codes of 4 bits, -8 to 7, as `bits.pack` lays
them out, with 8 added: byte j has the code of channel 2 j in its low bits, that of 2 j + 1 in its high ones.
GroupQueryAttention of onnxruntime reads and writes the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: What a code of 4 bits is stored with.
OFFSET = 8


def numbers(slots: Any) -> Any:
    """What slots [.., W] hold, [.., D]: codes in float32, numbers of a float type as they are."""
    kind = _kind(slots)
    if kind == "uint8":
        found = _apart(slots) * np.float32(1)
        found -= OFFSET
        return found
    return slots * np.float32(1) if kind == "int8" else slots


def as_slots(values: Any, slots: Any) -> Any:
    """Numbers [.., D] as slots [.., W] can be given them: rounded and cut where these hold codes."""
    kind = _kind(slots)
    if kind == "uint8":
        codes = values.round().clip(-OFFSET, OFFSET - 1) + OFFSET
        return codes[..., 0::2] + 16 * codes[..., 1::2]
    return values.round().clip(-128, 127) if kind == "int8" else values


def _apart(pairs: Any) -> Any:
    """Both codes of each byte, side by side."""
    codes = pairs[..., np.arange(2 * pairs.shape[-1]) // 2]  # a copy
    codes[..., 0::2] &= 15
    codes[..., 1::2] >>= 4
    return codes


def _kind(slots: Any) -> str:
    return str(slots.dtype).removeprefix("torch.")
