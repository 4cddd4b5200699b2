"""Rows cut into blocks, and numbers as float16 holds them: what most schemes start and end with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_LARGEST = torch.finfo(torch.float16).max


def in_blocks(rows: Tensor, block: int) -> Tensor:
    """Rows [.., M] as [.., ceil(M / block), block], padded with zeros."""
    padded = functional.pad(rows, (0, -rows.shape[-1] % block))
    blocks: Tensor = padded.unflatten(-1, (-1, block))
    return blocks


def halved(values: Tensor) -> Tensor:
    """The numbers in float16, cut to its largest."""
    return values.clamp(-_LARGEST, _LARGEST).half()
