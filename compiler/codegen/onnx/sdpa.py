"""Lowering of torch's scaled_dot_product_attention, of any rank, in elementary operators.

    softmax(q k^T * scale + mask) v         a row that sees nothing gives zeros, as in torch

Batch axes, masks and keys broadcast as in a product of matrices. A truth value in a mask chooses between the
score and -inf: what stands where nothing is seen never reaches the result.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from .lowerings import Context, lowering, unsupported
from .operands import operand

aten = torch.ops.aten


@lowering(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(context: Context, node: fx.Node) -> ir.Value:
    found, builder = context.arguments(node), context.builder
    if found["dropout_p"]:
        raise unsupported(node, f"dropout of {found['dropout_p']} draws random numbers")
    query, key, value = (found[name] for name in ("query", "key", "value"))
    dtype = node.meta["val"].dtype
    size = context.shape(query)[-1]
    if found["scale"] is None and size is None:
        raise unsupported(node, "a head size that is known only at run time")
    scale = found["scale"] if found["scale"] is not None else 1 / math.sqrt(int(size or 1))
    keys, values = context.value(key), context.value(value)
    if scale > 0 and _is_plain(query, key, value, found, dtype):  # onnxruntime takes no other scale
        return builder.op("Attention", context.value(query), keys, values, scale=scale)
    if found["enable_gqa"]:
        keys, values = (_for_all_heads(context, query, part, node) for part in (key, value))
    rank = key.meta["val"].dim()
    turned = builder.transpose(keys, *range(rank - 2), rank - 1, rank - 2)
    queries = builder.op("Mul", context.value(query), operand(context, scale, dtype))
    scores = builder.op("MatMul", queries, turned)
    scores = _masked(context, scores, found, dtype)
    out = builder.op("MatMul", builder.op("Softmax", scores, axis=-1), values)
    if found["attn_mask"] is None:
        return out
    blind = _blind(context, found["attn_mask"])
    return builder.op("Where", blind, operand(context, 0.0, dtype), out)


def _is_plain(query: Any, key: Any, value: Any, found: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether ONNX's own operator takes it, which is a quarter faster: four axes, no mask, nothing broadcast.

    With a mask it adds, where NaN and infinity would stay.
    """
    shapes = [str(list(part.meta["val"].shape[:2])) for part in (query, key, value)]
    plain = found["attn_mask"] is None and not found["is_causal"] and dtype == torch.float32
    return plain and query.meta["val"].dim() == 4 and len(set(shapes)) == 1


def _blind(context: Context, mask: Any) -> ir.Value:
    """Rows that see nothing, by the mask alone: [.., S, 1]."""
    builder, value = context.builder, context.value(mask)
    if mask.meta["val"].dtype == torch.bool:
        seen = builder.op(
            "ReduceMax", builder.cast(value, torch.int32), builder.ints(-1), keepdims=1
        )
        return builder.op("Not", builder.cast(seen, torch.bool))
    largest = builder.op("ReduceMax", value, builder.ints(-1), keepdims=1)
    return builder.op("Equal", largest, operand(context, -math.inf, mask.meta["val"].dtype))


def _for_all_heads(context: Context, query: Any, part: Any, node: fx.Node) -> ir.Value:
    """Keys or values [.., K, T, D] as [.., H, T, D], each head for the H / K queries that read it."""
    builder, shape = context.builder, context.shape(part)
    heads, own, size = context.shape(query)[-3], shape[-3], shape[-1]
    if heads is None or own is None or size is None:
        raise unsupported(node, "grouped heads whose number or size is known only at run time")
    lead = len(shape) - 3
    x = builder.op("Unsqueeze", context.value(part), builder.ints(lead + 1))
    x = builder.op("Expand", x, builder.ints(*[1] * (lead + 1), heads // own, 1, 1))
    return builder.reshape(x, [*[0] * lead, heads, -1, size])


def _masked(
    context: Context, scores: ir.Value, found: dict[str, Any], dtype: torch.dtype
) -> ir.Value:
    builder, mask = context.builder, found["attn_mask"]
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        return _seen(context, context.value(mask), scores, dtype)
    if mask is not None:
        return builder.op("Add", scores, operand(context, mask, dtype))
    if not found["is_causal"]:
        return scores
    shapes = builder.op("Shape", scores, start=-2)
    triangle = builder.op("ConstantOfShape", shapes, value=ir.tensor(np.ones(1, np.int32)))
    triangle = builder.op("Trilu", triangle, upper=0)
    return _seen(context, builder.cast(triangle, torch.bool), scores, dtype)


def _seen(context: Context, seen: ir.Value, scores: ir.Value, dtype: torch.dtype) -> ir.Value:
    return context.builder.op("Where", seen, scores, operand(context, -math.inf, dtype))
