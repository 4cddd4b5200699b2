"""Rows rotated by a randomized Hadamard matrix, so that their numbers are near Gaussian.

    rotated = (x * signs) H / sqrt(h),      x [.., h, m] for rows of h m numbers, H the Hadamard matrix of h

h is the largest power of two that divides a row: 576 numbers are 9 interleaved sets of 64. A set takes every
9th number, so that what differs from one stretch of a row to the next is spread over all of them. The signs
follow from the place by a fixed formula; nothing is stored. All is sums and differences, the same to the bit
whatever the number of rows.

Source: QuIP# (Tseng et al. 2024, section 3); its sizes that are no power of two use other Hadamard matrices.
A set of h numbers hides one that stands out among h, not among all: that is what the factors cost.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def rotate(rows: Tensor) -> Tensor:
    """Rows [.., M], rotated; lengths and products are kept."""
    return hadamard(rows * signs(rows.shape[-1], rows.device))


def rotate_back(rows: Tensor) -> Tensor:
    """The inverse of `rotate`."""
    return hadamard(rows) * signs(rows.shape[-1], rows.device)


def hadamard(rows: Tensor) -> Tensor:
    """Rows [.., M] times H / sqrt(h), without signs: symmetric, and so its own inverse."""
    width = rows.shape[-1]
    size = width & -width
    sets = rows.unflatten(-1, (size, -1))
    # Each step pairs the first half with the second and puts pairs side by side; after all of them every
    # number is back in its place.
    for _ in range(size.bit_length() - 1):
        first, second = sets.chunk(2, dim=-2)
        sets = torch.stack([first + second, first - second], dim=-2).flatten(-3, -2)
    turned: Tensor = sets.flatten(-2) * (1 / math.sqrt(size))
    return turned


def signs(width: int, device: torch.device | None = None) -> Tensor:
    """-1.0 or 1.0 for each place of a row."""
    return torch.tensor(_signs(width), device=device)


@lru_cache(maxsize=64)
def _signs(width: int) -> tuple[float, ...]:
    """-1.0 or 1.0 for each place: one bit of a 32-bit hash (multiply, xor with what is above, twice)."""
    found = []
    for place in range(width):
        mixed = (place + 1) * 0x9E3779B1 & 0xFFFFFFFF
        mixed = (mixed ^ mixed >> 15) * 0x85EBCA6B & 0xFFFFFFFF
        found.append(1.0 if (mixed ^ mixed >> 13) & 1 else -1.0)
    return tuple(found)
