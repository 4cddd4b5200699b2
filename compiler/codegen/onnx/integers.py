"""Products of integers: rows of activations in 8 bits times weights that are integers with one scale a row.

    x -> round_to_int8 -> stored_linear       in the graph
    y = MatMulInteger(x / s, codes) * s * u   in ONNX: s of a row of x, u of a row of the weight

Both sides are uint8 about 128. Unsigned by signed is up to twice as fast on processors with VNNI, but wrong
on others, which add pairs of products in 16 bits with saturation; signed by signed has no fast kernel
(onnxruntime 1.31). Codes know no NaN: of a row with one it gives numbers, where the operator gives NaN; and
it multiplies no batch without rows. Weights become such codes by operators over weights alone, computed when
a model is loaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from torch import fx

from ...ir.ops import einfold_ops
from ...ir.ops.rounding import LARGEST, LEAST
from ...ir.quant.scheme import Scheme
from ...ir.quant.schemes.grouped import Grouped
from ...ir.quant.schemes.qserve import QServe
from .lowerings import Context, lowering
from .stored_weight import Stored, bits_table

_U8, _F32 = int(ir.DataType.UINT8), int(ir.DataType.FLOAT)

_MIDDLE = 128


@lowering(einfold_ops.round_to_int8.default)
def round_to_int8(context: Context, node: fx.Node) -> ir.Value:
    """For readers that multiply no integers; where there is none, these nodes go."""
    builder = context.builder
    codes, scales = _rows(context, node)
    centred = builder.op("Sub", builder.op("Cast", codes, to=_F32), builder.floats(float(_MIDDLE)))
    return builder.op("Mul", centred, scales)


def _rows(context: Context, node: fx.Node) -> tuple[ir.Value, ir.Value]:
    """The codes of the rows that a node rounds, uint8 about 128, and their scales [.., 1]; made once."""
    builder, x = context.builder, context.value(node.args[0])
    size = builder.shared("Abs", x)
    largest = builder.shared("ReduceMax", size, builder.ints(-1), keepdims=1)
    scales = builder.shared("Div", largest, builder.floats(float(LARGEST)))
    scales = builder.shared("Max", scales, builder.floats(LEAST))
    codes = builder.shared("Round", builder.shared("Div", x, scales))
    codes = builder.shared("Add", codes, builder.floats(float(_MIDDLE)))
    return builder.shared("Cast", codes, to=_U8), scales


def of_integers(x: Any, scheme: Scheme) -> bool:
    """Whether a product is one of integers."""
    known = isinstance(scheme, Grouped | QServe) and scheme.integer_rows
    return known and x.target is einfold_ops.round_to_int8.default


def integer_product(stored: Stored, x: fx.Node, bias: ir.Value | None) -> ir.Value:
    """x @ weight.T + bias over what x rounds."""
    context, builder = stored.context, stored.context.builder
    codes, scales = _rows(context, x)
    middle = builder.constant(_MIDDLE, np.uint8)
    out = builder.op("MatMulInteger", codes, _columns(stored), middle, middle)
    out = builder.op("Mul", builder.op("Cast", out, to=_F32), scales)
    out = builder.op("Mul", out, _units(stored))
    return out if bias is None else builder.op("Add", out, bias)


def _columns(stored: Stored) -> ir.Value:
    """The weight's codes [width, rows]."""
    builder = stored.context.builder
    rows = stored.op("Reshape", codes_of(stored), builder.ints(stored.rows, -1))
    cut = builder.ints(0), builder.ints(stored.width), builder.ints(1)
    return stored.op("Transpose", stored.op("Slice", rows, *cut), perm=[1, 0])


def codes_of(stored: Stored) -> ir.Value:
    """The integers of a weight as uint8 about 128, [rows, G, block], by tables and sums of bytes: in wider
    numbers they would take thirty bytes a weight while a model is loaded."""
    scheme = stored.scheme
    if isinstance(scheme, QServe):
        return _progressive(stored)
    high, low = scheme.high_bits, scheme.low_bits
    if high == 8:
        return stored.piece("packed")
    begin = _MIDDLE - (1 << (scheme.bits - 1))
    codes = stored.looked_up("packed", bits_table(high, (np.arange(1 << high) << low) + begin, 8))
    if not low:
        return codes
    return stored.op("Add", codes, stored.looked_up("low", bits_table(low, np.arange(1 << low), 8)))


def _progressive(stored: Stored) -> ir.Value:
    """(q - z) s + 128, modulo 256 all along."""
    builder, groups = stored.context.builder, stored.size("scales")
    table = bits_table(4, np.arange(16), 8)
    index = stored.op("Cast", stored.piece("zeros"), to=int(ir.DataType.INT32))
    zeros = stored.gathered(table, index, (stored.rows, -1, 1))
    zeros = stored.op("Slice", zeros, builder.ints(0), builder.ints(groups), builder.ints(1))
    scales = stored.op("Unsqueeze", stored.piece("scales"), builder.ints(-1))
    codes = stored.op("Sub", stored.looked_up("packed", table), zeros)
    return stored.op("Add", stored.op("Mul", codes, scales), builder.constant(_MIDDLE, np.uint8))


def _units(stored: Stored) -> ir.Value:
    """The scales of rows, [rows] in float32."""
    label = "scales" if isinstance(stored.scheme, Grouped) else "units"
    units = stored.op("Cast", stored.piece(label), to=_F32)
    return stored.op("Reshape", units, stored.context.builder.ints(stored.rows))
