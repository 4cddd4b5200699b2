"""Integers in groups that share a scale, as checkpoints pack them, and `Grouped` where it holds them.

w[n, m] = (code[n, m] - zero[n, g]) * scale[n, g],     g = m // group, code in 0 .. 2^bits - 1
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import IRError, ModelError
from ..ir.quant.pack import unpack_bits
from ..ir.quant.schemes.grouped import Grouped
from ..ir.stored import StoredWeight
from ..ir.types import DTYPES
from ..ir.weights import Weight, derive

#: The largest block that a kept weight is stored in: a wider group is several with one scale.
_WIDEST = 128


@dataclass(frozen=True)
class Codes:
    """What a checkpoint holds of one weight [N, M]."""

    codes_NM: Tensor
    """Whole numbers of any type."""
    scales_NG: Tensor
    """Float32."""
    zeros_NG: Tensor | None
    """None for the middle of the range, 2^(bits-1)."""
    groups_M: Tensor | None = None
    """The group of each input; None where they stand in order."""


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes [.., count], uint8, of int32 words [.., W]: one stream of bits, low bits first, `bits` a code."""
    stream = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        return unpack_bits(stream, bits, count)
    places = torch.arange(8, dtype=torch.uint8)
    each = ((stream[..., None] >> places) & 1).flatten(-2)[..., : count * bits]
    powers = 1 << torch.arange(bits, dtype=torch.uint8)
    found: Tensor = (each.unflatten(-1, (count, bits)) * powers).sum(-1, dtype=torch.uint8)
    return found


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_words`; the last word is filled up with zeros."""
    places = torch.arange(bits, dtype=torch.uint8)
    each = ((codes.to(torch.uint8)[..., None] >> places) & 1).flatten(-2)
    each = pad(each, (0, -each.shape[-1] % 32)).unflatten(-1, (-1, 8))
    powers = 1 << torch.arange(8, dtype=torch.uint8)
    words: Tensor = (each * powers).sum(-1, dtype=torch.uint8).contiguous().view(torch.int32)
    return words


def in_groups(
    where: str,
    shape: tuple[int, int],
    bits: int,
    group: int,
    symmetric: bool,
    ordered: bool,
    load: Callable[[], Codes],
) -> Weight:
    """The weight [N, M] of codes; in `Grouped` where that holds them, which takes groups in order.

    `where` names it in messages. What `load` gives is checked: ModelError for scales that are not finite.
    """
    scheme = _scheme(shape[1], bits, group, symmetric) if ordered else None

    def loaded() -> Codes:
        found = load()
        if not bool(torch.isfinite(found.scales_NG).all()):
            raise ModelError(f"{where}: scales that are not finite; the checkpoint is damaged")
        return found

    if scheme is None:
        return Weight(shape, torch.float32, lambda: values(loaded(), bits, group))
    pieces = scheme.pieces(shape)
    parts = derive(
        [(size, DTYPES[kind]) for size, kind in pieces.values()],
        lambda: _pieces(loaded(), scheme, group, shape[1]),
    )
    return StoredWeight.holding(scheme, shape, dict(zip(pieces, parts, strict=True)))


def values(found: Codes, bits: int, group: int) -> Tensor:
    """The weight [N, M] in float32."""
    width = found.codes_NM.shape[1]
    index = found.groups_M
    if index is None:
        index = torch.arange(width) // group
    index = index.long()
    zeros = 1 << (bits - 1) if found.zeros_NG is None else found.zeros_NG.float()[:, index]
    return (found.codes_NM.float() - zeros) * found.scales_NG[:, index]


def _scheme(width: int, bits: int, group: int, symmetric: bool) -> Grouped | None:
    """The scheme that holds such groups as they are, if there is one."""
    row = group >= width  # has one scale, whatever its blocks
    block = math.gcd(width if row else group, _WIDEST)
    if row and block < 16:
        block = 32
    try:
        return Grouped(bits, block, symmetric)
    except IRError:
        return None


def _pieces(found: Codes, scheme: Grouped, group: int, width: int) -> list[Tensor]:
    count = math.ceil(width / scheme.block)
    index = (torch.arange(count) * scheme.block) // group  # the group that each block is of
    scales = found.scales_NG[:, index]
    zeros = None if found.zeros_NG is None else found.zeros_NG[:, index].to(torch.uint8)
    codes = pad(found.codes_NM.to(torch.uint8), (0, -width % scheme.block))
    if codes.shape[1] > width:
        last = 1 << (scheme.bits - 1) if zeros is None else zeros[:, -1:]
        codes[:, width:] = last
    middle = torch.full_like(scales, 1 << (scheme.bits - 1)) if zeros is None else zeros.float()
    grid = {"scales": scales[..., None], "zeros": middle[..., None]}
    packed = scheme.pack(codes.unflatten(-1, (-1, scheme.block)), grid)
    return [packed[name].contiguous() for name in scheme.pieces((len(scales), width))]
