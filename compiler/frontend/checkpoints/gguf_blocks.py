"""Blocks of a GGUF as the pieces of a scheme: the same codes and scales in another order.

    Q4_0   2 bytes d, 16 of codes: the low halves of the bytes, then the high ones     w = d (q - 8)
    Q8_0   2 bytes d, 32 codes with a sign                                             w = d q

Blocks of 256 are several groups. `x >> 0, 2, ..` stands for all bytes of a run at the first place, then all
at the second, and so on; "half" for 128 weights.

    Q2_K   16 bytes, a group each: s, and m << 4; 64 of q: by halves, >> 0, 2, 4, 6; u; v
    Q3_K   32 bytes of the high bit: >> 0 .. 7; 64 of q as in Q2_K; 12 of s (`_scales_3`); u
    Q4_K   u; v; 12 bytes of s and m (`_scales_4`); 128 of q: by quarters, >> 0, 4
    Q5_K   as Q4_K, with 32 bytes of the high bit, >> 0 .. 7, before q
    Q6_K   128 bytes of the low 4 bits: by halves, >> 0, 4; 64 of the high 2 as in Q2_K; 16 of s; u

Source: ggml's block formats (llama.cpp, ggml-common.h); what each stands for is in `schemes/k_quants.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.quant.scheme import Scheme
from ...ir.quant.schemes.grouped import Grouped
from ...ir.quant.schemes.k_quants import KQuant

#: Schemes that hold blocks as they are, by ggml's numbers of their types.
KEPT: dict[int, Scheme] = {
    2: Grouped(4, 32),
    8: Grouped(8, 32),
    10: KQuant(2),
    11: KQuant(3),
    12: KQuant(4),
    13: KQuant(5),
    14: KQuant(6),
}

#: Bytes of the parts of a block of 256 in their order, by the bits of its codes.
_PARTS = {
    2: {"scales": 16, "codes": 64, "units": 2, "min_units": 2},
    3: {"high": 32, "codes": 64, "scales": 12, "units": 2},
    4: {"units": 2, "min_units": 2, "scales": 12, "codes": 128},
    5: {"units": 2, "min_units": 2, "scales": 12, "high": 32, "codes": 128},
    6: {"codes": 128, "high": 64, "scales": 16, "units": 2},
}


def pieces_of(scheme: Scheme, rows: Tensor) -> dict[str, Tensor]:
    """The pieces of a weight from the bytes [N, ..] of its blocks."""
    if isinstance(scheme, KQuant):
        return _k_quant(scheme, rows)
    assert isinstance(scheme, Grouped)
    blocks = rows.unflatten(-1, (-1, 2 + scheme.block * scheme.bits // 8))
    raw = blocks[..., 2:]
    codes = raw ^ 128 if scheme.bits == 8 else _spread(raw, 4, scheme.block // 2)
    scales = _half(blocks[..., :2]).float()
    middle = torch.full_like(scales, 1 << (scheme.bits - 1))
    return scheme.pack(codes, {"scales": scales, "zeros": middle})


def _k_quant(scheme: KQuant, rows: Tensor) -> dict[str, Tensor]:
    sizes = _PARTS[scheme.bits]
    blocks = rows.unflatten(-1, (-1, sum(sizes.values())))
    parts = dict(zip(sizes, blocks.split([*sizes.values()], dim=-1), strict=True))
    codes, (scales, mins) = _codes(scheme.bits, parts), _scales(scheme.bits, parts["scales"])
    units = _half(parts["units"])[..., 0]
    return scheme.of_codes(
        codes.flatten(1).unflatten(-1, (-1, scheme.block)),
        (scales.flatten(1), units),
        None if mins is None else (mins.flatten(1), _half(parts["min_units"])[..., 0]),
    )


def _codes(bits: int, parts: dict[str, Tensor]) -> Tensor:
    """Codes [N, S, 256]."""
    if bits in (2, 3):
        codes = _spread(parts["codes"], 2, 32)
        return codes if bits == 2 else codes | _spread(parts["high"], 1, 32) << 2
    if bits == 6:
        return _spread(parts["codes"], 4, 64) | _spread(parts["high"], 2, 32) << 4
    codes = _spread(parts["codes"], 4, 32)
    return codes if bits == 4 else codes | _spread(parts["high"], 1, 32) << 4


def _scales(bits: int, raw: Tensor) -> tuple[Tensor, Tensor | None]:
    """Codes of scales and of minimums [N, S, G]."""
    if bits == 2:
        return raw & 15, raw >> 4
    if bits == 3:  # 8 bytes of low halves, 4 of the two bits above
        low, high = raw.split([8, 4], dim=-1)
        return (_spread(low, 4, 8) | _spread(high, 2, 4) << 4).to(torch.int16) - 32, None
    if bits == 6:
        return raw.view(torch.int8), None
    # The first four of each have 6 bits of a byte; the others are 4 bits of one, and 2 at the top of another.
    one, two, both = raw.split([4, 4, 4], dim=-1)
    scales = torch.cat((one & 63, both & 15 | one >> 6 << 4), dim=-1)
    return scales, torch.cat((two & 63, both >> 4 | two >> 6 << 4), dim=-1)


def _spread(raw: Tensor, bits: int, run: int) -> Tensor:
    """Codes of so many bits: of each run of bytes those at the lowest place, then those at the next."""
    places = range(0, 8, bits)
    runs = raw.unflatten(-1, (-1, run))
    found = torch.stack([runs >> place & (1 << bits) - 1 for place in places], dim=-2)
    return found.flatten(-3)


def _half(raw: Tensor) -> Tensor:
    """Pairs of bytes as float16."""
    return raw.contiguous().view(torch.float16)
