"""The kernel of K-quants: codes go through MatMulNBits, and what stands beside them is a second product.

With the units multiplied out, and z the kernel's own code of 0, a weight is s (q - z) + (s z - m): the first
is what MatMulNBits computes, the second is the same for all weights of a group, so it takes the sums of
the activations of each group.

A weight [19456, 896], padded to 1,024 columns, beside int4 in one run (AVX-512, one thread): 1.4 times its
time with 1 row and 1.2 with 128 in 4 bits, 2.7 and 1.3 in 2 bits, which become 4, 5.4 and 2.4 in 6, two
products.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from ...ir.quant.schemes.grouped import Grouped
from ...ir.quant.schemes.k_quants import PLANES, SUPERBLOCK, KQuant
from .nbits import of_planes, spread, times
from .stored import kernel_of
from .stored_weight import Stored


@kernel_of(KQuant)
def kquant(stored: Stored, x: ir.Value, bias: ir.Value | None) -> ir.Value:
    scheme: KQuant = stored.scheme
    builder = stored.context.builder
    width = SUPERBLOCK * stored.size("units")
    if width != stored.width:
        pads, last = builder.ints(0, width - stored.width), builder.ints(-1)
        x = builder.op("Pad", x, pads, None, last)
    scales = _multiplied_out(stored, "scales", "units", scheme.added)
    plain = replace(stored, scheme=Grouped(scheme.bits, scheme.block), width=width)
    out = of_planes(plain, x, bias, scales)
    if not scheme.kind.minimums:
        return out
    mins = _multiplied_out(stored, "mins", "min_units", 0)
    beside = stored.op("Sub", times(stored, scales, 1 << (scheme.bits - 1)), mins)
    # As a product, since onnxruntime's ReduceSum gives no rows another shape: an expert may have none.
    ones = builder.constant(np.ones((scheme.block, 1)), np.float32)
    sums = builder.op("MatMul", builder.reshape(x, [-1, scheme.block]), ones)
    sums = builder.reshape(sums, [-1, width // scheme.block])
    more = builder.op("MatMul", sums, stored.op("Transpose", beside, perm=[1, 0]))
    return builder.op("Add", out, builder.op("Reshape", more, builder.op("Shape", out)))


def _multiplied_out(stored: Stored, name: str, units: str, added: int) -> ir.Value:
    """Scales or minimums [N, G] in float32."""
    block, builder = stored.scheme.block, stored.context.builder
    high, low = PLANES[stored.scheme.kind.scale_bits]
    codes = _codes(stored, name, high, 1 << low)
    if low:
        codes = stored.op("Add", codes, _codes(stored, f"low_{name}", low, 1))
    if added:
        codes = stored.op("Sub", codes, builder.floats(float(added)))
    wide = stored.op("Cast", stored.piece(units), to=int(ir.DataType.FLOAT))
    each = SUPERBLOCK // block
    return stored.op("Mul", codes, spread(stored, wide, stored.size(units) * each, each))


def _codes(stored: Stored, label: str, bits: int, factor: int) -> ir.Value:
    """Codes [N, G] of a plane, times a factor, in float32."""
    byte = np.arange(256)[:, None]
    table = (byte >> np.arange(0, 8, bits) & (1 << bits) - 1) * factor
    index = stored.op("Cast", stored.piece(label), to=int(ir.DataType.INT32))
    return stored.gathered(table.astype(np.float32), index, (stored.rows, -1))
