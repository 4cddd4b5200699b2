"""Rows turned by an orthogonal matrix that mixes all of their numbers, for rows of any length.

    turned = A X B,      X [a, b] the numbers x * signs of a row of a b, A and B symmetric and orthogonal

B is the Hadamard matrix of b, the largest power of two that divides a row, up to 64; A that of the other
powers of two, in the Kronecker product with the Hartley matrix of what is left, cos + sin of 2 pi i j / m
over the root of m. So two small matrices turn a row: of 9 and 64 numbers for 576, of 32 and 64 for 2,048.
The signs are those of `hadamard.py`: they follow from the place, and nothing is stored.

Rows that are turned as a model runs have signs in the matrices, A S and T B, so that those two products are
all there is to do: a number's sign is then the product of one by its row of X and one by its column.

Source: QuaRot (Ashkboos et al. 2024, section 4), whose sizes that are no power of two take tables of larger
Hadamard matrices; a Hartley matrix there is for every size, and mixes as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from .hadamard import hadamard, signs

#: Numbers that are turned at a time.
_SLAB = 1 << 21

#: Numbers of the inner matrix at most.
_INNER = 64


def turned(rows: Tensor) -> Tensor:
    """Rows [.., M], turned in float64; lengths and products are kept. In the rows' type.

    A few rows at a time, so that a table of gigabytes takes its own size once more and no multiple of it.
    """
    return _by_slabs(rows, lambda some: mixed(some.mul_(signs(some.shape[-1]))))


def turned_by(rows: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """Rows [.., ab] as the matrices [a, a] and [b, b] turn them, in float64; in the rows' type."""
    return _by_slabs(rows, lambda some: _product(outer.double(), some, inner.double()))


def _by_slabs(rows: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    width = rows.shape[-1]
    flat, found = rows.reshape(-1, width), torch.empty(rows.shape, dtype=rows.dtype)
    step = max(1, _SLAB // width)
    for start in range(0, len(flat), step):
        found.view(-1, width)[start : start + step] = turn(flat[start : start + step].double())
    return found


def _product(outer: Tensor, rows: Tensor, inner: Tensor) -> Tensor:
    found: Tensor = (outer @ rows.unflatten(-1, (len(outer), -1)) @ inner).flatten(-2)
    return found


def mixed(rows: Tensor) -> Tensor:
    """Rows [.., M] without the signs: its own inverse."""
    outer, inner = (matrix.to(rows.dtype) for matrix in factors(rows.shape[-1]))
    return _product(outer, rows, inner)


@lru_cache(maxsize=16)
def factors(width: int) -> tuple[Tensor, Tensor]:
    """(A [a, a], B [b, b]) of rows of some width, in float64."""
    power = width & -width
    inner = min(power, _INNER)
    rest = width // power
    place = torch.arange(rest, dtype=torch.float64)
    angle = place[:, None] * place * (2 * math.pi / rest)
    hartley = (angle.cos() + angle.sin()) / math.sqrt(rest)
    return torch.kron(hartley, _of_hadamard(power // inner)), _of_hadamard(inner)


def signed_factors(width: int) -> tuple[Tensor, Tensor]:
    """(A S [a, a], T B [b, b]) of rows of some width, in float64: orthogonal, and not symmetric."""
    outer, inner = factors(width)
    return outer * signs(len(outer)), signs(len(inner))[:, None] * inner


def _of_hadamard(size: int) -> Tensor:
    return hadamard(torch.eye(size, dtype=torch.float64))
