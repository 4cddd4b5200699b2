"""What pieces stand for, in standard operators: for embeddings, for the flavour `portable`, and where no
kernel reads a scheme.

Schemes that are not here go through torch's exporter, with more nodes and seconds for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.quant.levels import Levels
from ...ir.quant.scheme import Scheme
from ...ir.quant.schemes.grouped import SUPER, Grouped
from ...ir.quant.schemes.k_quants import PLANES, SUPERBLOCK, KQuant
from ...ir.quant.schemes.microscaling import E4M3, MXFP4, NVFP4, POWERS
from ...ir.quant.schemes.qserve import QServe
from ...ir.quant.schemes.small_floats import FP6
from ...ir.quant.schemes.ternary import LINE, Ternary
from .builder import Builder
from .lowerings import Context
from .quantized import unpacked

_INDEX, _F32 = int(ir.DataType.INT32), int(ir.DataType.FLOAT)


@dataclass(frozen=True)
class Pieces:
    """Values of the pieces [.., G, ...] of a weight, or of rows of it; `lead` axes stand before G."""

    context: Context
    scheme: Any
    values: Mapping[str, ir.Value]
    lead: int
    groups: int
    block: int

    @property
    def builder(self) -> Builder:
        return self.context.builder

    def codes(self, label: str, bits: int) -> ir.Value:
        """Codes [.., G, block] of a plane, in float32."""
        parts = unpacked(self.context, self.values[label], bits)
        return self.builder.reshape(parts, [*self._lead, self.groups, self.block])

    def of_groups(self, label: str, bits: int) -> ir.Value:
        """Codes [.., G] of a plane of zero points, in float32."""
        builder = self.builder
        flat = builder.reshape(unpacked(self.context, self.values[label], bits), [*self._lead, -1])
        return builder.op(
            "Slice", flat, builder.ints(0), builder.ints(self.groups), builder.ints(self.lead)
        )

    def planes(self, read: Callable[[str, int], ir.Value], labels: tuple[str, str]) -> ir.Value:
        """What is read of the plane of high bits, with that of the low ones where there is one."""
        builder, low = self.builder, self.scheme.low_bits
        high = read(labels[0], self.scheme.high_bits)
        if not low:
            return high
        high = builder.op("Mul", high, builder.floats(float(1 << low)))
        return builder.op("Add", high, read(labels[1], low))

    def table(self, numbers: tuple[float, ...], codes: ir.Value) -> ir.Value:
        """Numbers of a table by code."""
        index = self.builder.op("Cast", codes, to=_INDEX)
        known = self.builder.constant(np.array(numbers, np.float32), np.float32)
        return self.builder.op("Gather", known, index, axis=0)

    def times(
        self, wide: ir.Value, scales: ir.Value, width: int, mins: ir.Value | None = None
    ) -> ir.Value:
        """[.., G, block] times scales [.., G], less minimums [.., G], as rows [.., width]."""
        builder = self.builder
        values = builder.op("Mul", wide, builder.op("Unsqueeze", scales, builder.ints(-1)))
        if mins is not None:
            values = builder.op("Sub", values, builder.op("Unsqueeze", mins, builder.ints(-1)))
        flat = builder.reshape(values, [*self._lead, self.groups * self.block])
        if width == self.groups * self.block:
            return flat
        return builder.op(
            "Slice", flat, builder.ints(0), builder.ints(width), builder.ints(self.lead)
        )

    @property
    def _lead(self) -> list[int]:
        return [0] * self.lead


def widened(
    context: Context, scheme: Scheme, values: Mapping[str, ir.Value], lead: int, width: int
) -> ir.Value | None:
    """The weight [.., width] in float32; None for a scheme that is not known here."""
    if isinstance(scheme, QServe):
        builder = context.builder
        pieces = _pieces(context, scheme, values, lead, width, scheme.block)
        zeros = builder.op("Unsqueeze", pieces.of_groups("zeros", 4), builder.ints(-1))
        codes = builder.op("Sub", pieces.codes("packed", 4), zeros)
        whole = pieces.times(codes, builder.op("Cast", values["scales"], to=_F32), width)
        return builder.op("Mul", whole, builder.op("Unsqueeze", values["units"], builder.ints(-1)))
    if isinstance(scheme, Grouped):
        pieces = _pieces(context, scheme, values, lead, width, scheme.block_of(width))
        return pieces.times(_less(pieces, _zeros(pieces)), _grouped_scales(pieces), width)
    if isinstance(scheme, KQuant):
        pieces = _pieces(
            context, scheme, values, lead, -(-width // SUPERBLOCK) * SUPERBLOCK, scheme.block
        )
        codes = _less(pieces, context.builder.floats(float(scheme.middle)))
        scales = _multiplied_out(pieces, "scales", "units", scheme.added)
        mins = None
        if scheme.kind.minimums:
            mins = _multiplied_out(pieces, "mins", "min_units", 0)
        return pieces.times(codes, scales, width, mins)
    if isinstance(scheme, Ternary):
        pieces = _pieces(context, scheme, values, lead, width, scheme.block or LINE)
        codes = context.builder.op("Sub", pieces.codes("packed", 2), context.builder.floats(2.0))
        return pieces.times(codes, values["scales" if scheme.block else "scale"], width)
    if isinstance(scheme, Levels):
        pieces = _pieces(context, scheme, values, lead, width, scheme.block_of(width))
        if isinstance(scheme, FP6):
            codes = pieces.planes(pieces.codes, ("packed", "low"))
        else:
            codes = pieces.codes("packed", scheme.bits)
        return pieces.times(pieces.table(scheme.levels, codes), _level_scales(pieces), width)
    return None


def _pieces(
    context: Context,
    scheme: Scheme,
    values: Mapping[str, ir.Value],
    lead: int,
    width: int,
    block: int,
) -> Pieces:
    return Pieces(context, scheme, values, lead, -(-width // block), block)


def _zeros(pieces: Pieces) -> ir.Value:
    builder, scheme = pieces.builder, pieces.scheme
    if scheme.symmetric:
        return builder.floats(float(1 << (scheme.bits - 1)))
    zeros = pieces.planes(pieces.of_groups, ("zeros", "low_zeros"))
    return builder.op("Unsqueeze", zeros, builder.ints(-1))


def _less(pieces: Pieces, offset: ir.Value) -> ir.Value:
    return pieces.builder.op("Sub", pieces.planes(pieces.codes, ("packed", "low")), offset)


def _grouped_scales(pieces: Pieces) -> ir.Value:
    builder, scales = pieces.builder, pieces.values["scales"]
    if pieces.scheme.scales == "f32":
        return scales
    scales = builder.op("Cast", scales, to=_F32)
    if pieces.scheme.scales == "f16":
        return scales
    index = builder.constant(np.arange(pieces.groups) // SUPER, np.int64)
    units = builder.op("Gather", pieces.values["units"], index, axis=-1)
    return builder.op("Mul", scales, units)


def _multiplied_out(pieces: Pieces, name: str, units: str, added: int) -> ir.Value:
    """Scales or minimums of K-quants, [.., G]."""
    builder = pieces.builder
    high, low = PLANES[pieces.scheme.kind.scale_bits]
    codes = pieces.of_groups(name, high)
    if low:
        codes = builder.op("Mul", codes, builder.floats(float(1 << low)))
        codes = builder.op("Add", codes, pieces.of_groups(f"low_{name}", low))
    if added:
        codes = builder.op("Sub", codes, builder.floats(float(added)))
    index = builder.constant(np.arange(pieces.groups) * pieces.block // SUPERBLOCK, np.int64)
    wide = builder.op("Cast", pieces.values[units], to=_F32)
    return builder.op("Mul", codes, builder.op("Gather", wide, index, axis=-1))


def _level_scales(pieces: Pieces) -> ir.Value:
    scales = pieces.values["scales"]
    if isinstance(pieces.scheme, MXFP4):
        return pieces.table(POWERS, scales)
    if isinstance(pieces.scheme, NVFP4):
        return pieces.builder.op("Mul", pieces.table(E4M3, scales), pieces.values["scale"])
    return scales
