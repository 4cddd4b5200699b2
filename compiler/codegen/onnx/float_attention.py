"""One new token's attention over a float32 cache, as two products of matrices for each KV head.

    out = softmax(q . K) . V        q and out have a row for each query head that reads the KV head

GroupQueryAttention goes through the cache once for every query head. Here it is read once for all that
share a KV head: one layer took 0.30 to 0.44 of the time with seven heads a KV head, 0.37 to 0.56 with four,
0.45 to 0.61 with three, from 64 to 16,384 tokens (onnxruntime 1.31, one thread), and results agree to 2e-7.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .attention_bytes import PRODUCTS_FROM
from .builder import CONTRIB, Builder
from .one_token import capped


def fewest_tokens(group: int) -> int:
    """Tokens from which on it is faster: beside the products there are some fifteen small operators. With two
    heads a KV head the products took 0.85 of the time behind 1,024 tokens, and 0.55 behind 4,096."""
    return 512 if group > PRODUCTS_FROM else 2048


@dataclass(frozen=True)
class FloatAttention:
    """The sizes of one layer's attention. The mask is [B, 1, 1, C], 0 where a slot is seen."""

    builder: Builder
    heads: int
    kv_heads: int
    size: int
    scale: float
    softcap: float
    sinks_H: ir.Value | None
    mask: ir.Value

    def __call__(self, query_B1M: ir.Value, keys_BKCD: ir.Value, values_BKCD: ir.Value) -> ir.Value:
        """Turned queries, and both caches with the new token in; [B, 1, heads * size] out."""
        builder, group = self.builder, self.heads // self.kv_heads
        query = builder.op("Mul", query_B1M, builder.floats(self.scale))
        query = builder.reshape(query, [0, self.kv_heads, group, self.size])
        logits = builder.op("FusedMatMul", query, keys_BKCD, domain=CONTRIB, transB=1)
        logits = builder.op("Add", capped(builder, logits, self.softcap), self.mask)
        sinks = self.sinks_H
        if sinks is not None:
            sinks = builder.reshape(sinks, [1, self.kv_heads, group, 1])
        weights = softmax_beside(builder, logits, sinks)
        out = builder.op("MatMul", weights, values_BKCD)
        return builder.reshape(out, [0, 1, self.heads * self.size])


def softmax_beside(builder: Builder, logits: ir.Value, sinks: ir.Value | None) -> ir.Value:
    """Weights of logits of four axes, the last that of keys, beside what sinks take, which spread over the
    first three, where the model has sinks."""
    if sinks is None:
        return builder.op("Softmax", logits, axis=3)
    lead = builder.op("Shape", logits, start=0, end=3)
    lead = builder.op("Concat", lead, builder.ints(1), axis=0)
    column = builder.op("Expand", sinks, lead)
    weights = builder.op("Concat", logits, column, axis=3)
    weights = builder.op("Softmax", weights, axis=3)
    return builder.op("Slice", weights, builder.ints(0), builder.ints(-1), builder.ints(3))
