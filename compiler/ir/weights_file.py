"""Writes a program's weights to one safetensors file, one weight in memory at a time.

The same file serves every reader: the reference interpreter by name, and an ONNX model by offset, as
external data. Large tensors start at multiples of 64 bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from .weights import Weight, WeightStore

ALIGNMENT = 64

_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Placement:
    """Where a weight lies in the file, in bytes from the file's start."""

    offset: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]


Progress = Callable[[str, int, int], None]


def write_weights(
    store: WeightStore, path: Path, progress: Progress | None = None
) -> tuple[dict[str, Placement], str]:
    """Writes all weights; gives their placements and the file's BLAKE3 hash in hex.

    `progress(name, bytes done, bytes in all)` is called before each weight. Weights are computed as
    they are written and dropped after, which releases the model that they come from.
    """
    # Sizes that keep the alignment come first, in the order of the graph; the odd ones last.
    names = sorted(
        store,
        key=lambda name: (
            store[name].nbytes % ALIGNMENT != 0,
            -store[name].dtype.itemsize * (store[name].nbytes % ALIGNMENT != 0),
        ),
    )
    total = store.nbytes
    header, placements = _header(store, names)
    digest = blake3()
    done = 0
    with path.open("wb") as stream:
        stream.write(header)
        digest.update(header)
        for name in names:
            if progress is not None:
                progress(name, done, total)
            weight = store[name]
            data = _bytes_of(weight)
            stream.write(data)
            digest.update(data)
            done += weight.nbytes
            del data
            store.release(name)
    return placements, digest.hexdigest()


def _header(store: WeightStore, names: list[str]) -> tuple[bytes, dict[str, Placement]]:
    entries: dict[str, dict[str, Any]] = {}
    place = 0
    for name in names:
        weight = store[name]
        entries[name] = {
            "dtype": _SAFETENSORS_NAMES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [place, place + weight.nbytes],
        }
        place += weight.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)  # the format allows spaces behind the header
    start = 8 + len(text)
    placements = {
        name: Placement(
            start + entry["data_offsets"][0],
            store[name].nbytes,
            store[name].dtype,
            store[name].shape,
        )
        for name, entry in entries.items()
    }
    return struct.pack("<Q", len(text)) + text, placements


def _bytes_of(weight: Weight) -> memoryview:
    tensor = weight.load()
    flat = tensor.reshape(-1).view(torch.uint8) if math.prod(weight.shape) else tensor.reshape(0)
    return flat.numpy().data
