"""Kernels of schemes whose levels are, or nearly are, evenly spaced: MatMulNBits over 2, 4 or 8 bits.

3 bits           4-bit codes, q + 4
5, 6 bits        two products: the high plane in 4 bits, the low one in 2
QServe           8-bit codes, its integers, where activations are as they are (else `integers.py`)
E2M1, E2M3       8-bit codes: every level is a whole multiple of the smallest
ternary          2-bit codes as they are
NF4, FP4, E4M3   8-bit codes, levels rounded to 1/127 of the largest, where activations are rounded too
                 (accuracy level 4); else the weight is widened
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...ir.quant.levels import Levels
from ...ir.quant.schemes.grouped import SUPER, Grouped
from ...ir.quant.schemes.microscaling import E4M3, MXFP4, NVFP4, POWERS
from ...ir.quant.schemes.qlora import FP4, NF4
from ...ir.quant.schemes.qserve import QServe
from ...ir.quant.schemes.small_floats import FP6, FP8
from ...ir.quant.schemes.ternary import LINE, Ternary
from .integers import codes_of
from .kernels import FEWEST_2, short_block
from .quantized import Codes, matmul_nbits
from .stored import kernel_of
from .stored_weight import Stored, bits_table

_F32 = int(ir.DataType.FLOAT)


def _product(
    stored: Stored, x: ir.Value, bias: ir.Value | None, block: int, codes: Codes
) -> ir.Value:
    """MatMulNBits over codes in blocks; `block` is that of the scheme, or the padded width."""
    builder = stored.context.builder
    short = short_block(block)
    packed, scales = codes.packed, codes.scales
    if short != block:
        groups = -(-stored.width // short)
        packed = stored.op(
            "Reshape", packed, builder.ints(stored.rows, -1, short * codes.bits // 8)
        )
        packed = _first(stored, packed, groups)
        scales = spread(stored, scales, groups, block // short)
    shorter = replace(codes, packed=packed, scales=scales)
    return matmul_nbits(stored.context, x, shorter, bias, short, (stored.rows, stored.width))


def spread(stored: Stored, x: ir.Value, count: int, each: int) -> ir.Value:
    """[N, G] as [N, count], `each` numbers from one."""
    index = stored.context.builder.constant(np.arange(count) // each, np.int64)
    return stored.op("Gather", x, index, axis=1)


def _first(stored: Stored, x: ir.Value, count: int) -> ir.Value:
    """The first `count` of axis 1."""
    builder = stored.context.builder
    return stored.op("Slice", x, builder.ints(0), builder.ints(count), builder.ints(1))


def times(stored: Stored, scales: ir.Value, factor: float) -> ir.Value:
    """Weights times a number."""
    return (
        scales if factor == 1 else stored.op("Mul", scales, stored.context.builder.floats(factor))
    )


@kernel_of(Grouped)
def grouped(stored: Stored, x: ir.Value, bias: ir.Value | None) -> ir.Value:
    return of_planes(stored, x, bias, _grouped_scales(stored, stored.scheme))


def of_planes(stored: Stored, x: ir.Value, bias: ir.Value | None, scales: ir.Value) -> ir.Value:
    """Integers in planes, as `Grouped` has them, under scales [N, G] in float32."""
    scheme: Grouped = stored.scheme
    block = scheme.block_of(stored.width)
    if scheme.bits == 3:
        return _product(stored, x, bias, block, _three(stored, scales))
    if not scheme.low_bits:
        return _product(stored, x, bias, block, _plain(stored, scales, block))
    high = _plain(stored, times(stored, scales, 1 << scheme.low_bits), block)
    out = _product(stored, x, bias, block, high)
    low = _product(stored, x, None, block, _low(stored, scales, block))
    return stored.context.builder.op("Add", out, low)


def _grouped_scales(stored: Stored, scheme: Grouped) -> ir.Value:
    scales = stored.piece("scales")
    if scheme.scales == "f32":
        return scales
    scales = stored.op("Cast", scales, to=_F32)
    if scheme.scales == "f16":
        return scales
    units = spread(stored, stored.piece("units"), stored.size("scales"), SUPER)
    return stored.op("Mul", scales, units)


def _plain(stored: Stored, scales: ir.Value, block: int) -> Codes:
    """The plane `packed` as it is."""
    scheme: Grouped = stored.scheme
    if scheme.high_bits == 2 and block < FEWEST_2:
        return _mapped(stored, scales, 2, np.arange(4) + 6, 4, "packed", "zeros")
    zeros = None if scheme.symmetric else stored.piece("zeros")
    return Codes(stored.piece("packed"), scales, zeros, scheme.high_bits)


def _mapped(
    stored: Stored,
    scales: ir.Value,
    bits: int,
    codes: NDArray[np.int64],
    wide: int,
    packed: str,
    zeros: str,
) -> Codes:
    """A plane whose codes become others in `wide` bits, and zero points too; without these zero becomes
    2^(wide-1)."""
    table = bits_table(bits, codes, wide)
    found = None
    if not stored.scheme.symmetric:
        found = _rows_looked_up(stored, zeros, table, wide)
    return Codes(stored.looked_up(packed, table), scales, found, wide)


def _rows_looked_up(stored: Stored, label: str, table: NDArray[np.uint8], wide: int) -> ir.Value:
    """Zero points [N, bytes] in other bits, cut to whole bytes of what they are of."""
    index = stored.op("Cast", stored.piece(label), to=int(ir.DataType.INT32))
    found = stored.gathered(table, index, (stored.rows, -1))
    return _first(stored, found, -(-stored.size("scales") * wide // 8))


def _three(stored: Stored, scales: ir.Value) -> Codes:
    """q + 4 in 4 bits, whose highest bits are q's and its inverse: from q's high two bits and its low one."""
    high, low = np.array([4, 6, 8, 10]), np.array([0, 1])
    planes = [
        _mapped(stored, scales, 2, high, 4, "packed", "zeros"),
        _mapped(stored, scales, 1, low, 4, "low", "low_zeros"),
    ]
    packed = stored.op("BitwiseOr", *(plane.packed for plane in planes))
    zeros = None
    if planes[0].zeros is not None:
        zeros = stored.op("BitwiseOr", *(plane.zeros for plane in planes))
    return Codes(packed, scales, zeros, 4)


def _low(stored: Stored, scales: ir.Value, block: int) -> Codes:
    """The plane `low` of 5 or 6 bits, whose zero point is 0 where none is given."""
    scheme: Grouped = stored.scheme
    builder, bits = stored.context.builder, scheme.low_bits
    wide = 4 if block < FEWEST_2 else 2
    if (bits, wide) != (2, 2):
        middle = 1 << (wide - 1)
        codes = np.arange(1 << bits) + middle
        return _mapped(stored, scales, bits, codes, wide, "low", "low_zeros")
    if not scheme.symmetric:
        zeros = stored.piece("low_zeros")
    else:
        groups = -(-stored.width // short_block(block))
        zeros = stored.op(
            "ConstantOfShape",
            builder.ints(stored.rows, -(-groups * 2 // 8)),
            value=ir.tensor(np.zeros(1, np.uint8)),
        )
    return Codes(stored.piece("low"), scales, zeros, 2)


@kernel_of(Ternary)
def ternary(stored: Stored, x: ir.Value, bias: ir.Value | None) -> ir.Value:
    """Codes as they are; where one scale is for all, rows are one block."""
    if stored.scheme.block:
        packed, scales, block = stored.piece("packed"), stored.piece("scales"), stored.scheme.block
    else:
        builder = stored.context.builder
        block = LINE * -(-stored.width // LINE)
        scales = stored.op("Expand", stored.piece("scale"), builder.ints(stored.rows, 1))
        packed = stored.piece("packed", shape=(stored.rows, 1, block // 4))
    codes = Codes(packed, scales, None, 2)
    return _product(stored, x, bias, block, codes)


def _levels(
    stored: Stored,
    x: ir.Value,
    bias: ir.Value | None,
    scales: ir.Value,
    codes: ir.Value,
    unit: float,
) -> ir.Value:
    """Levels that are multiples of `unit`, in 8 bits about 128."""
    block = stored.scheme.block_of(stored.width)
    of_8 = Codes(codes, times(stored, scales, unit), None, 8)
    return _product(stored, x, bias, block, of_8)


def _whole(scheme: Levels, unit: float) -> NDArray[np.int64]:
    """The 8-bit codes of levels, to the nearest multiple of a unit."""
    return 128 + np.rint(np.array(scheme.levels) / unit).astype(np.int64)


def _of_levels(stored: Stored, unit: float) -> ir.Value:
    """8-bit codes from the levels' codes of 4 or 8 bits in `packed`."""
    scheme: Levels = stored.scheme
    return stored.looked_up("packed", bits_table(scheme.bits, _whole(scheme, unit), 8))


@kernel_of(MXFP4)
def mxfp4(stored: Stored, x: ir.Value, bias: ir.Value | None) -> ir.Value:
    scales = _byte_scales(stored, POWERS)
    return _levels(stored, x, bias, scales, _of_levels(stored, 0.5), 0.5)


@kernel_of(NVFP4)
def nvfp4(stored: Stored, x: ir.Value, bias: ir.Value | None) -> ir.Value:
    scales = stored.op("Mul", _byte_scales(stored, E4M3), stored.piece("scale"))
    return _levels(stored, x, bias, scales, _of_levels(stored, 0.5), 0.5)


def _byte_scales(stored: Stored, table: tuple[float, ...]) -> ir.Value:
    """Scales [N, G] by their codes."""
    index = stored.op("Cast", stored.piece("scales"), to=int(ir.DataType.INT32))
    return stored.gathered(np.array(table, np.float32), index, (stored.rows, -1))


@kernel_of(NF4)
@kernel_of(FP4)
@kernel_of(FP8)
def rounded(stored: Stored, x: ir.Value, bias: ir.Value | None) -> ir.Value:
    unit = max(stored.scheme.levels) / 127
    return _levels(stored, x, bias, stored.piece("scales"), _of_levels(stored, unit), unit)


@kernel_of(FP6)
def fp6(stored: Stored, x: ir.Value, bias: ir.Value | None) -> ir.Value:
    """E2M3 exactly; two codes at a time from a byte of high parts and four bits of low ones."""
    scheme: FP6 = stored.scheme
    exact = scheme.mantissa == 3
    unit = 1 / 8 if exact else max(scheme.levels) / 127
    byte, pair = np.arange(256), np.arange(1 << 12)
    halves = np.stack((byte & 15, byte >> 4), axis=-1).astype(np.int32) << 8
    low = stored.looked_up("low", halves)
    index = stored.op(
        "BitwiseOr", low, stored.op("Cast", stored.piece("packed"), to=int(ir.DataType.INT32))
    )
    codes = np.stack(
        [(pair >> 4 * at & 15) << 2 | pair >> 8 + 2 * at & 3 for at in range(2)], axis=-1
    )
    table = _whole(scheme, unit)[codes].astype(np.uint8)
    block = scheme.block_of(stored.width)
    shape = (stored.rows, stored.size("scales"), block)
    return _levels(
        stored, x, bias, stored.piece("scales"), stored.gathered(table, index, shape), unit
    )


@kernel_of(QServe)
def qserve(stored: Stored, x: ir.Value, bias: ir.Value | None) -> ir.Value:
    """Activations as they are: its integers in 8 bits, in blocks that share the scale of their row."""
    builder, groups = stored.context.builder, stored.size("scales")
    units = stored.op("Unsqueeze", stored.piece("units"), builder.ints(-1))
    codes = Codes(codes_of(stored), spread(stored, units, groups, groups), None, 8)
    return _product(stored, x, bias, stored.scheme.block, codes)
