"""One new token's attention over an int8 cache, as two products of integers.

    scores = (q * scale * key_scale) . K           q in two planes of small integers, K as it is stored
    out    = softmax(scores) . V * value_scale     the probabilities in two planes, blocks of slots apart

GroupQueryAttention widens the cache to float32 as it reads it; MatMulInteger does not. A *plane* holds a
matrix rounded to multiples of its scale, and the next plane what is left, on a finer scale: two give 13 or 14
bits. Probabilities are taken in blocks of `BLOCK` slots, each scaled to its largest, and merged by their
maxima and sums as flash decoding merges its splits: beside a probability of 0.9, often the first token's,
thousands of 5e-6 may make up most of the result, and only those in its own block are lost to it.

Planes of a query hold -63 to 63, planes of probabilities 0 to 127. Processors without VNNI add pairs of
products in 16 bits with saturation; so small, one side unsigned and the other signed, no pair can reach that:
255 * 63 * 2 and 127 * 128 * 2 are below 2 ** 15. onnxruntime has fast kernels only where the first matrix is
unsigned: keys get an offset, which the product's zero point takes away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .attention_bytes import columns_of
from .builder import CONTRIB, Builder
from .one_token import hidden_slots

#: Tokens from which on it is faster: there are some forty small operators. At half of it the two are even
#: where the processor is shared with others.
FEWEST_TOKENS = 4096

#: Query heads a KV head from which on it is: the cost is that of reading and converting the cache, whatever
#: the number of queries. With 4 it took 0.55 of the time, with 3 as long.
SMALLEST_GROUP = 4

#: Slots a block; steps go this way where it divides the cache. Less loses fewer small probabilities beside a
#: large one, and costs more sums to merge: a half took 5 % longer, a double 1 % less.
BLOCK = 512

#: Planes: of queries the largest number, and how much finer the second is; of probabilities both.
_LIMIT, _FINER, LEVELS = 63.0, 126.0, 127.0


@dataclass(frozen=True)
class IntegerAttention:
    """The sizes and scales of one layer's attention. The mask is [B, 1, N, 1, BLOCK], of N blocks: 0 where a
    slot is seen."""

    builder: Builder
    heads: int
    kv_heads: int
    size: int
    scale: float
    key_scale: ir.Value
    value_scale: ir.Value
    mask: ir.Value

    def __call__(self, query_B1M: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        """Turned queries, and both caches with the new token in; [B, 1, heads * size] out."""
        scores = self.builder.op("Add", self._scores(query_B1M, keys), self.mask)
        out = self._weighted(scores, values)
        return self.builder.reshape(out, [0, 1, self.heads * self.size])

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def _scores(self, query_B1M: ir.Value, keys: ir.Value) -> ir.Value:
        """Logits [B, K, N, G, BLOCK]."""
        builder, group = self.builder, self.group
        query = builder.reshape(query_B1M, [0, self.kv_heads, group, self.size])
        scale = builder.shared("Mul", self._by_head(self.key_scale), builder.floats(self.scale))
        by_keys, join = query_columns(builder, builder.op("Mul", query, scale), group)
        products = products_of(builder, by_keys, keys)
        products = builder.reshape(products, [0, 0, -1, BLOCK, columns_of(group)])
        join = builder.reshape(join, [0, 0, 1, group, columns_of(group)])
        return builder.op("FusedMatMul", join, products, domain=CONTRIB, transB=1)

    def _weighted(self, scores_BKNGT: ir.Value, values: ir.Value) -> ir.Value:
        """The values' weighted mean [B, K, G, D]."""
        builder = self.builder
        top = builder.op("ReduceMax", scores_BKNGT, builder.ints(-1), keepdims=1)
        # The largest becomes what the first plane has room for.
        shift = builder.op("Sub", top, builder.floats(float(np.log(LEVELS))))
        weights = builder.op("Exp", builder.op("Sub", scores_BKNGT, shift))
        total = builder.op("ReduceSum", weights, builder.ints(-1), keepdims=1)
        sums = builder.op(
            "MatMulIntegerToFloat",
            weight_planes(builder, weights),
            builder.reshape(values, [0, 0, -1, BLOCK, self.size]),
            builder.floats(1.0),
            builder.floats(1.0),
            domain=CONTRIB,
        )
        # Blocks are merged by what their largest is of the largest of all.
        highest = builder.op("ReduceMax", top, builder.ints(2), keepdims=1)
        share = builder.op("Exp", builder.op("Sub", top, highest))
        finer = builder.op("Div", share, builder.floats(LEVELS))
        shares = builder.reshape(
            builder.op("Concat", share, finer, axis=3), [0, 0, -1, self.group, 1]
        )
        sums = builder.reshape(sums, [0, 0, -1, self.group, self.size])
        out = self._merged(builder.op("Mul", sums, shares))
        out = builder.op("Div", out, self._merged(builder.op("Mul", total, share)))
        return builder.op("Mul", out, self._by_head(self.value_scale))

    def _merged(self, parts: ir.Value) -> ir.Value:
        return self.builder.op("ReduceSum", parts, self.builder.ints(2), keepdims=0)

    def _by_head(self, scale_KD: ir.Value) -> ir.Value:
        shape = self.builder.ints(self.kv_heads, 1, self.size)
        return self.builder.shared("Reshape", scale_KD, shape)


def query_columns(builder: Builder, query_BKGD: ir.Value, group: int) -> tuple[ir.Value, ir.Value]:
    """(both planes of a query as columns [B, K, D, M], what adds up products with them and gives them their
    scale [B, K, G, M]), M as `columns_of` says."""
    planes, factor = query_planes(builder, query_BKGD)
    more = columns_of(group) - 2 * group
    if more:
        planes = builder.op("Pad", planes, builder.ints(0, 0, 0, 0, 0, 0, more, 0))
    return builder.transpose(planes, 0, 1, 3, 2), adds_up(builder, factor, group, more)


def products_of(builder: Builder, columns_BKDM: ir.Value, stored_BKND: ir.Value) -> ir.Value:
    """Products [B, K, N, M] of int8 rows with columns of planes."""
    # 128 more, seen as unsigned: the sum wraps around.
    shifted = builder.op("Add", stored_BKND, builder.constant(-128, np.int8))
    return builder.op(
        "MatMulIntegerToFloat",
        builder.op("BitCast", shifted, to=int(ir.DataType.UINT8)),
        columns_BKDM,
        builder.floats(1.0),
        builder.floats(1.0),
        builder.constant(128, np.uint8),
        domain=CONTRIB,
    )


def query_planes(builder: Builder, query_BKGD: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(both planes [B, K, 2 G, D], by what each row was multiplied [B, K, G, 1])."""
    zero, one = builder.constant(0, np.int8), builder.floats(1.0)
    top = builder.op("ReduceMax", builder.op("Abs", query_BKGD), builder.ints(-1), keepdims=1)
    top = builder.op("Max", top, builder.floats(1e-30))  # not 0
    factor = builder.op("Div", builder.floats(_LIMIT), top)
    scaled = builder.op("Mul", query_BKGD, factor)
    first = builder.op("QuantizeLinear", scaled, one, zero)
    rest = builder.op("Sub", scaled, builder.op("DequantizeLinear", first, one, zero))
    second = builder.op("QuantizeLinear", rest, builder.floats(1 / _FINER), zero)
    return builder.op("Concat", first, second, axis=2), factor


def adds_up(builder: Builder, factor_BKG1: ir.Value, group: int, more: int = 0) -> ir.Value:
    """What adds up products with both planes of queries and gives them their scale, [B, K, G, 2 G], behind
    which it takes `more` of zeros."""
    both = np.concatenate([np.eye(group), np.eye(group) / _FINER, np.zeros((group, more))], axis=1)
    return builder.op("Div", builder.constant(both, np.float32), factor_BKG1)


def weight_planes(builder: Builder, weights: ir.Value, count: int = 2) -> ir.Value:
    """Planes [.., count * G, T], uint8, of weights [.., G, T] up to `LEVELS`: whole numbers, and what they
    lack, `LEVELS` times as fine in each further plane."""
    zero, one = builder.constant(0, np.uint8), builder.floats(1.0)
    planes, rest = [], weights
    for place in range(count - 1):
        if place:
            rest = builder.op("Mul", rest, builder.floats(LEVELS))
        # Not by Cast and back: onnxruntime runs that on one thread, and what two share moves between caches.
        whole = builder.op("Floor", rest)
        rest = builder.op("Sub", rest, whole)
        planes.append(builder.op("QuantizeLinear", whole, one, zero))
    planes.append(builder.op("QuantizeLinear", rest, builder.floats(1 / LEVELS), zero))
    return builder.op("Concat", *planes, axis=-2)


def in_blocks(builder: Builder, slots: ir.Value) -> ir.Value:
    """Whether slots, [1], come in whole blocks."""
    beyond = builder.shared("Mod", slots, builder.ints(BLOCK))
    return builder.shared("Equal", beyond, builder.ints(0))


def blocks() -> str:
    """What the runtime is told: the slots of a block, and the capacity from which on whole blocks count."""
    return f"{BLOCK} {FEWEST_TOKENS}"


def mask(builder: Builder, used_B: ir.Value, slots: ir.Value, wanted: ir.Value) -> ir.Value:
    """[B, 1, N, 1, BLOCK]: 0 for slots up to the new token's, far below for the others.

    One for all layers, and of a single block where it is not wanted.
    """
    hidden = hidden_slots(builder, used_B, slots, wanted, BLOCK)
    return builder.shared("Reshape", hidden, builder.ints(0, 1, -1, 1, BLOCK))
