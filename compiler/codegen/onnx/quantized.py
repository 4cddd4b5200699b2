"""Lowerings of packed weights: MatMulNBits and GatherBlockQuantized, or standard operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import fx

from ...ir.ops import einfold_ops
from .builder import CONTRIB
from .einfold_ops import product
from .lowerings import Context, lowering, unsupported

_UNSIGNED = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


@dataclass(frozen=True)
class Codes:
    """Codes [N, G, block * bits / 8], scales [N, G] and zero points [N, bytes], or 2^(bits-1)."""

    packed: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    bits: int


def matmul_nbits(
    context: Context,
    x: ir.Value,
    codes: Codes,
    bias: ir.Value | None,
    block: int,
    shape: Sequence[int],
) -> ir.Value:
    """onnxruntime's MatMulNBits over the codes of a weight, of `shape` [N, M]."""
    rows, width = shape
    return context.builder.op(
        "MatMulNBits",
        x,
        codes.packed,
        codes.scales,
        codes.zeros,
        None,
        bias,
        domain=CONTRIB,
        K=width,
        N=rows,
        bits=codes.bits,
        block_size=block,
        accuracy_level=context.accuracy_level,
    )


@lowering(einfold_ops.quantized_linear.default, flavour="ort")
def quantized_linear_ort(context: Context, node: fx.Node) -> ir.Value:
    x, packed, scales, zeros, bias, bits, block = context.arguments(node).values()
    builder, name = context.builder, context.weight_name(packed)
    codes = Codes(
        builder.weight(name),
        context.value(scales),
        None if zeros is None else builder.weight(context.weight_name(zeros)),
        bits,
    )
    shape = (builder.placements[name].shape[0], _width(context, x))
    return matmul_nbits(context, context.value(x), codes, context.optional(bias), block, shape)


@lowering(einfold_ops.quantized_linear.default, flavour="portable")
def quantized_linear_portable(context: Context, node: fx.Node) -> ir.Value:
    x, packed, scales, zeros, bias, bits, block = node.args
    weight = dequantized(context, node, packed, scales, zeros, bits, block, _width(context, x))
    return product(context, x, weight, context.optional(bias), node)


def checked_kind(
    context: Context, node: fx.Node, bits: int, groups: int, zeros: bool
) -> ir.DataType:
    """The type of packed codes in standard operators. Raises UnsupportedError for what they cannot hold."""
    if bits not in _UNSIGNED or bits == 2:
        raise unsupported(
            node, f"standard operators of opset {context.opset} have no {bits}-bit weights"
        )
    if zeros and groups * bits % 8:
        raise unsupported(
            node,
            "an odd number of groups with zero points of their own, which ONNX would pack across "
            "rows; use symmetric weights or another block",
        )
    return _UNSIGNED[bits]


def dequantized(
    context: Context,
    node: fx.Node,
    packed: object,
    scales: object,
    zeros: object,
    bits: object,
    block: object,
    width: int,
) -> ir.Value:
    """The float weight [N, width] by DequantizeLinear with blocks along axis 1."""
    builder = context.builder
    name = context.weight_name(packed)
    rows, groups, _ = builder.placements[name].shape
    assert isinstance(bits, int) and isinstance(block, int)
    kind = checked_kind(context, node, bits, groups, zeros is not None)
    codes = builder.weight(name, shape=(rows, groups * block), dtype=kind)
    if zeros is None:
        offsets = builder.filled((rows, groups), 1 << (bits - 1), kind)
    else:
        offsets = builder.weight(context.weight_name(zeros), shape=(rows, groups), dtype=kind)
    return dequantize_linear(context, codes, context.value(scales), offsets, block, width)


def dequantize_linear(
    context: Context, codes: ir.Value, scales: ir.Value, offsets: ir.Value, block: int, width: int
) -> ir.Value:
    """DequantizeLinear over codes [N, G * block] in their type, cut to [N, width]."""
    builder = context.builder
    weight = builder.op("DequantizeLinear", codes, scales, offsets, axis=1, block_size=block)
    if width % block == 0:
        return weight
    return builder.op("Slice", weight, builder.ints(0), builder.ints(width), builder.ints(1))


@lowering(einfold_ops.quantized_embedding.default, flavour="ort")
def quantized_embedding_ort(context: Context, node: fx.Node) -> ir.Value:
    ids, packed, scales, zeros, bits, block, width = context.arguments(node).values()
    builder = context.builder
    name = context.weight_name(packed)
    rows, groups, size = builder.placements[name].shape
    if bits == 2 or width != groups * int(block):
        return _gathered(context, node)
    return builder.op(
        "GatherBlockQuantized",
        builder.weight(name, shape=(rows, groups * size)),
        context.value(ids),
        context.value(scales),
        None if zeros is None else builder.weight(context.weight_name(zeros)),
        domain=CONTRIB,
        bits=bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )


@lowering(einfold_ops.quantized_embedding.default, flavour="portable")
def quantized_embedding_portable(context: Context, node: fx.Node) -> ir.Value:
    return _gathered(context, node)


def _gathered(context: Context, node: fx.Node) -> ir.Value:
    """Gathers the packed rows, then unpacks those alone: the table is never dequantized as a whole."""
    ids, packed, scales, zeros, bits, block, width = node.args
    assert isinstance(bits, int) and isinstance(block, int) and isinstance(width, int)
    builder = context.builder
    name = context.weight_name(packed)
    _, groups, _ = builder.placements[name].shape
    rows = builder.op(
        "Gather", builder.weight(name), context.value(ids), axis=0
    )  # [B, S, G, bytes]
    codes = builder.reshape(unpacked(context, rows, bits), [0, 0, groups, block])
    scale = builder.op(
        "Unsqueeze",
        builder.op("Gather", context.value(scales), context.value(ids), axis=0),
        builder.ints(-1),
    )
    if zeros is None:
        offset = builder.floats(float(1 << (bits - 1)))
    else:
        zero_rows = builder.op(
            "Gather", builder.weight(context.weight_name(zeros)), context.value(ids), axis=0
        )
        whole = builder.reshape(unpacked(context, zero_rows, bits), [0, 0, -1])
        cut = builder.op("Slice", whole, builder.ints(0), builder.ints(groups), builder.ints(2))
        offset = builder.op("Unsqueeze", cut, builder.ints(-1))
    values = builder.op("Mul", builder.op("Sub", codes, offset), scale)
    flat = builder.reshape(values, [0, 0, groups * block])
    if width == groups * block:
        return flat
    return builder.op("Slice", flat, builder.ints(0), builder.ints(width), builder.ints(2))


def unpacked(context: Context, packed: ir.Value, bits: int) -> ir.Value:
    """uint8 with several codes a byte, low bits first, as float32 with a new last axis."""
    builder = context.builder
    if bits == 8:
        return builder.op("Cast", packed, to=int(ir.DataType.FLOAT))
    mask = builder.constant((1 << bits) - 1, np.uint8)
    parts = []
    for index in range(8 // bits):
        moved = packed
        if index:
            moved = builder.op(
                "BitShift", packed, builder.constant(bits * index, np.uint8), direction="RIGHT"
            )
        part = builder.op("BitwiseAnd", moved, mask)
        parts.append(builder.op("Unsqueeze", part, builder.ints(-1)))
    return builder.op("Cast", builder.op("Concat", *parts, axis=-1), to=int(ir.DataType.FLOAT))


def _width(context: Context, x: object) -> int:
    width = context.shape(x)[-1]
    assert width is not None
    return width
