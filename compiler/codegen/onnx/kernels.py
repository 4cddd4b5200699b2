"""What onnxruntime holds of a weight in memory, by its scheme; `nbits.py` and `k_quants.py` have the kernels.
Imports no ONNX.

Measured by `benchmarks/weight_formats.py` (onnxruntime 1.31, one AVX2 core, a weight [19456, 896];
milliseconds of the processor with 1 row and with 128):

    4 bits                 2.1   162      3 bits and scales in float16 too, brought into it when loaded
    2 bits                 2.1   187      in blocks of 16: 127 and 240, so they become 4-bit ones
    8 bits                 3.4   313      levels in 8 bits: 3.4 to 4.2 and 273 to 313
    5 and 6 bits           4.1   350      two products
    float32                7.6   124
    MatMulBnb4            20.9   145      beside 5.1 and 119 of float32 in that run

While it loads, what brings codes into another form takes 1 to 6 bytes a weight, of fp6 15, for all weights at
once: onnxruntime keeps what each node gives until the last is computed.

MatMulBnb4 makes a float32 copy of the weight at every step, knows no rows that are padded, and reads as many
bytes as its attributes say, whether or not they are there: it is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ir.quant.scheme import Scheme
from ...ir.quant.schemes.grouped import Grouped
from ...ir.quant.schemes.k_quants import KQuant
from ...ir.quant.schemes.microscaling import MXFP4, NVFP4
from ...ir.quant.schemes.qlora import FP4, NF4
from ...ir.quant.schemes.qserve import QServe
from ...ir.quant.schemes.small_floats import FP6, FP8
from ...ir.quant.schemes.ternary import Ternary

#: Bits of a weight that is widened.
WIDE = 32

#: One row over float32 beside int4, see above.
_SLOWER = 3

#: Longer blocks are taken for several of at most so many weights that share a scale.
LONGEST = 128

#: Blocks from which on 2-bit codes have a fast kernel.
FEWEST_2 = 32


def short_block(block: int) -> int:
    """A block of the kernels in whole numbers of which a scheme's block can be cut."""
    if block <= 2 * LONGEST and block & (block - 1) == 0:
        return block
    return next(size for size in (LONGEST, 64, 32) if block % size == 0)


def _grouped(scheme: Grouped, exact: bool) -> int:
    if not scheme.symmetric and scheme.block not in (16, 32, 64, 128, 256):
        return WIDE  # zero points of several blocks would share a byte
    plane = {2: 2 if (scheme.block or LONGEST) >= FEWEST_2 else 4, 4: 4, 8: 8}
    if scheme.bits == 3:
        return 4
    return plane[scheme.high_bits] + (plane[2] if scheme.low_bits else 0)


def _whole(scheme: Any, exact: bool) -> int:
    """Levels that are whole multiples of the smallest."""
    return 8


def _rounded(scheme: Any, exact: bool) -> int:
    """Levels that are rounded to 8 bits where activations are rounded too."""
    return WIDE if exact else 8


#: Bits of a weight in the form that its kernel reads, by scheme; `exact` asks for products in float32.
_BITS: dict[type[Scheme], Callable[[Any, bool], int]] = {
    Grouped: _grouped,
    KQuant: lambda scheme, exact: _grouped(Grouped(scheme.bits, scheme.block), exact),
    Ternary: lambda scheme, exact: 2,
    QServe: _whole,
    MXFP4: _whole,
    NVFP4: _whole,
    FP6: lambda scheme, exact: _rounded(scheme, exact and scheme.mantissa == 2),
    NF4: _rounded,
    FP4: _rounded,
    FP8: _rounded,
}


def runtime_bits(scheme: Scheme, exact: bool, flavour: str) -> int:
    """Bits that a weight takes once onnxruntime has loaded it, without scales; `WIDE` where no kernel reads
    the scheme, and the weight is widened to float32."""
    known = _BITS.get(type(scheme))
    return WIDE if known is None or flavour != "ort" else known(scheme, exact)


def remark(scheme: Scheme, exact: bool, flavour: str) -> str:
    """What a compile says of weights in a scheme that have no kernel; "" where they have."""
    read = any(name.startswith("quantized") for name in scheme.operators.values())
    if not scheme.operators or read or runtime_bits(scheme, exact, flavour) != WIDE:
        return ""
    return (
        f"onnxruntime has no kernel for weights in {scheme.describe()}: they are small in the file, are "
        "widened to float32 when the model is loaded, take four bytes each from then on, and a token takes "
        f"{_SLOWER} times what it takes with int4 (measured on a weight [19456, 896])"
    )
