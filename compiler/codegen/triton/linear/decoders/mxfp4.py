"""MXFP4: e2m1 in blocks of 32 that share a power of two (OCP Microscaling Formats v1.0, section 5)."""

from __future__ import annotations

from typing import Any

from ..decoder import DECODERS, MANTISSA, TRITON, Decoder, plain_codes


@DECODERS.register
class Mxfp4Decoder(Decoder):
    """The three bits of a magnitude are exponent and mantissa of a wider float too, far below its range:
    times a power of two they are what they stand for, subnormal 0.5 and all. Exact."""

    name = "mxfp4"
    scales = ("u8",)

    def block(self, scheme: Any) -> int:
        return 32

    def values(self, scheme: Any, kind: str, place: str) -> list[str]:
        (mantissa, one) = MANTISSA[kind]
        width = 32 if kind == "fp32" else 16
        number = f"(((q & 7) << {mantissa - 1}) | ((q & 8) << {width - 4}))"
        if kind == "fp16":
            number = f"{number}.to(tl.int16)"
        factor = f"tl.full([], {float(2 ** (one - 1))!r}, {TRITON[kind]})"
        return [
            plain_codes(4, place),
            f"values = {number}.to({TRITON[kind]}, bitcast=True) * {factor}",
        ]

    def scale(self) -> str:
        # 2^(e - 127): e is the exponent of a float32 but for its ends, 2^-127 and NaN.
        power = "scale.to(tl.int32) << 23"
        ends = f"tl.where(scale == 0, 1 << 22, tl.where(scale == 255, 0x7FC00000, {power}))"
        return f"({ends}).to(tl.float32, bitcast=True)"
