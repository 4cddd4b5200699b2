"""Lowerings of `einfold` operators other than attention, experts and packed weights."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ...ir.ops import einfold_ops
from .builder import CONTRIB
from .lowerings import Context, lowering, unsupported


@lowering(einfold_ops.rms_norm.default, flavour="ort")
def rms_norm_ort(context: Context, node: fx.Node) -> ir.Value:
    x, weight, eps = node.args
    # In the default domain by history, not by standard: onnxruntime knows it under no other name.
    return context.builder.op(
        "SimplifiedLayerNormalization",
        context.value(x),
        context.value(weight),
        axis=-1,
        epsilon=eps,
        stash_type=1,
    )


@lowering(einfold_ops.rms_norm.default, flavour="portable")
def rms_norm_portable(context: Context, node: fx.Node) -> ir.Value:
    x, weight, eps = node.args
    return context.builder.op(
        "RMSNormalization", context.value(x), context.value(weight), axis=-1, epsilon=eps
    )


@lowering(einfold_ops.layer_norm.default)
def layer_norm(context: Context, node: fx.Node) -> ir.Value:
    x, weight, bias, eps = node.args
    return context.builder.op(
        "LayerNormalization",
        context.value(x),
        context.value(weight),
        context.value(bias),
        axis=-1,
        epsilon=eps,
    )


@lowering(einfold_ops.add_rms_norm.default, flavour="ort")
def add_rms_norm_ort(context: Context, node: fx.Node) -> list[ir.Value]:
    return _skip_norm(context, node, "SimplifiedLayerNormalization")


@lowering(einfold_ops.add_layer_norm.default, flavour="ort")
def add_layer_norm_ort(context: Context, node: fx.Node) -> list[ir.Value]:
    return _skip_norm(context, node, "LayerNormalization")


@lowering(einfold_ops.add_rms_norm.default, flavour="portable")
def add_rms_norm_portable(context: Context, node: fx.Node) -> list[ir.Value]:
    return _added(context, node, "RMSNormalization")


@lowering(einfold_ops.add_layer_norm.default, flavour="portable")
def add_layer_norm_portable(context: Context, node: fx.Node) -> list[ir.Value]:
    return _added(context, node, "LayerNormalization")


def _skip_norm(context: Context, node: fx.Node, norm: str) -> list[ir.Value]:
    """onnxruntime's norm with a residual, where it takes the operands: three axes, in single precision."""
    *operands, eps = node.args
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    if value.dim() != 3 or value.dtype != torch.float32:
        return _added(context, node, norm)
    values = map(context.value, operands)
    out = context.builder.multi(f"Skip{norm}", 4, *values, domain=CONTRIB, epsilon=eps)
    return [out[0], out[3]]


def _added(context: Context, node: fx.Node, norm: str) -> list[ir.Value]:
    x, residual, *weights, eps = node.args
    total = context.builder.op("Add", context.value(x), context.value(residual))
    scales = [context.value(weight) for weight in weights]
    return [context.builder.op(norm, total, *scales, axis=-1, epsilon=eps), total]


@lowering(einfold_ops.linear.default, flavour="ort")
def linear_ort(context: Context, node: fx.Node) -> ir.Value:
    """FusedMatMul reads the weight as [N, M], so the file holds it as torch does, and tied weights once."""
    x, weight, bias = node.args
    out = context.builder.op(
        "FusedMatMul", context.value(x), context.value(weight), domain=CONTRIB, transB=1
    )
    return out if bias is None else context.builder.op("Add", out, context.value(bias))


@lowering(einfold_ops.linear.default, flavour="portable")
def linear_portable(context: Context, node: fx.Node) -> ir.Value:
    x, weight, bias = node.args
    return product(context, x, context.value(weight), context.optional(bias), node)


def product(
    context: Context, x: Any, weight_NM: ir.Value, bias: ir.Value | None, node: fx.Node
) -> ir.Value:
    """x @ weight.T + bias by Gemm, over x flattened to two axes where it has three."""
    builder = context.builder
    value, shape = context.value(x), context.shape(x)
    outputs = context.shape(node)[-1]
    if outputs is None or shape[-1] is None:
        raise unsupported(node, "a weight of unknown size")
    if len(shape) == 2:
        return builder.op("Gemm", value, weight_NM, bias, transB=1)
    if len(shape) != 3:
        out = builder.op("MatMul", value, builder.transpose(weight_NM, 1, 0))
        return out if bias is None else builder.op("Add", out, bias)
    flat = builder.reshape(value, [-1, shape[-1]])
    out = builder.op("Gemm", flat, weight_NM, bias, transB=1)
    lead = builder.shared("Shape", value, start=0, end=2)
    return builder.op("Reshape", out, builder.op("Concat", lead, builder.ints(outputs), axis=0))


@lowering(einfold_ops.embedding.default)
def embedding(context: Context, node: fx.Node) -> ir.Value:
    ids, table = node.args
    return context.builder.op("Gather", context.value(table), context.value(ids), axis=0)


@lowering(einfold_ops.mix_channels.default)
def mix_channels(context: Context, node: fx.Node) -> ir.Value:
    """In products of two axes: of more, onnxruntime takes none without rows, such as a head may have."""
    x, outer, inner = node.args
    builder, (sets, size) = context.builder, (len(_value(outer)), len(_value(inner)))
    value = context.value(x)
    rows = builder.op("MatMul", builder.reshape(value, [-1, size]), context.value(inner))
    rows = builder.transpose(builder.reshape(rows, [-1, sets, size]), 0, 2, 1)
    rows = builder.op("Gemm", builder.reshape(rows, [-1, sets]), context.value(outer), transB=1)
    rows = builder.transpose(builder.reshape(rows, [-1, size, sets]), 0, 2, 1)
    return builder.op("Reshape", rows, builder.op("Shape", value))


def _value(node: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value


@lowering(einfold_ops.select_rows.default)
def select_rows(context: Context, node: fx.Node) -> ir.Value:
    x, rows = node.args
    width = context.shape(x)[-1]
    assert width is not None
    flat = context.builder.reshape(context.value(x), [-1, width])
    return context.builder.op("Gather", flat, context.value(rows), axis=0)


@lowering(einfold_ops.gated_activation.default)
def gated_activation(context: Context, node: fx.Node) -> ir.Value:
    gate, up, kind = node.args
    return gate_of(context, context.value(gate), context.value(up), str(kind), 1.0, 0.0)


def gate_of(
    context: Context, gate: ir.Value, up: ir.Value, kind: str, alpha: float, limit: float
) -> ir.Value:
    """activation(gate) * up for a kind of `activation.GATES`."""
    builder = context.builder
    if kind == "swiglu_clamped":
        gate = builder.op("Clip", gate, None, builder.floats(limit))
        up = builder.op("Clip", up, builder.floats(-limit), builder.floats(limit))
        up = builder.op("Add", up, builder.floats(1.0))
        return builder.op("Mul", up, _swish(context, gate, alpha))
    if kind == "silu":
        active = _swish(context, gate, 1.0)
    elif kind == "relu":
        active = builder.op("Relu", gate)
    else:
        active = builder.op("Gelu", gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    return builder.op("Mul", active, up)


def _swish(context: Context, x: ir.Value, alpha: float) -> ir.Value:
    """x * sigmoid(alpha * x)."""
    builder = context.builder
    if context.flavour == "ort":
        return builder.op("QuickGelu", x, domain=CONTRIB, alpha=alpha)
    scaled = x if alpha == 1.0 else builder.op("Mul", x, builder.floats(alpha))
    return builder.op("Mul", x, builder.op("Sigmoid", scaled))


@lowering(einfold_ops.rotary.default)
def rotary(context: Context, node: fx.Node) -> ir.Value:
    x, positions, cos, sin, interleaved = context.arguments(node).values()
    _, _, heads, size = context.shape(x)
    assert heads is not None and size is not None
    flat = context.builder.reshape(context.value(x), [0, 0, heads * size])
    turned = rotate(
        context,
        flat,
        context.value(positions),
        context.value(cos),
        context.value(sin),
        heads,
        2 * int(cos.meta["val"].shape[1]),
        size,
        bool(interleaved),
    )
    return context.builder.reshape(turned, [0, 0, heads, size])


def rotate(
    context: Context,
    x_BSM: ir.Value,
    positions: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    heads: int,
    width: int,
    size: int,
    interleaved: bool,
) -> ir.Value:
    """RotaryEmbedding of opset 23 over [B, S, heads * size]."""
    return context.builder.op(
        "RotaryEmbedding",
        x_BSM,
        cos,
        sin,
        positions,
        num_heads=heads,
        rotary_embedding_dim=0 if width == size else width,
        interleaved=int(interleaved),
    )
