"""One new token's attention over an int8 cache, as two products of integers.

    scores = (q * scale * key_scale) . K           q in three planes of small integers, K as it is stored
    out    = softmax(scores) . V * value_scale     the probabilities in four planes

GroupQueryAttention widens the cache to float32 as it reads it; MatMulInteger does not. A *plane* holds a
matrix rounded to multiples of its scale, and the next plane what is left, on a scale 126 times finer: three
give 20 bits, four 27. Few would not do: beside a probability of 0.9, often the first token's, thousands of
5e-6 make up a tenth of the result, and in three planes they would be up to a tenth wrong, all alike.

Planes hold -63 to 63. Processors without VNNI add pairs of products in 16 bits with saturation; so small, one
side unsigned and the other signed, no pair can reach that: 255 * 63 * 2 and 127 * 128 * 2 are below 2 ** 15.
onnxruntime has fast kernels only where the first matrix is unsigned: keys and probabilities get an offset,
which the product's zero point takes away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .builder import CONTRIB, Builder

#: Query heads a KV head from which on this is faster than GroupQueryAttention: the cost is that of reading
#: and converting the cache, whatever the number of queries. With 7 it took 0.7 of the time, with 4 as long.
SMALLEST_GROUP = 6

#: Tokens from which on it is faster: there are some thirty small operators. At half of it the two are even
#: where the processor is shared with others, as more of this goes through the cache that processors share.
FEWEST_TOKENS = 8192

#: Tokens up to which the sum of 127 * 63 a token fits in 32 bits.
_MOST_TOKENS = 2**18

#: Every slot is read, used or not; so many thirds of them must be used.
_USED_THIRDS = 2

#: The largest number in a plane, and how much finer the next plane is.
_LIMIT, _FINER = 63.0, 126.0

#: Planes of a query and of its probabilities.
_QUERY_PLANES, _WEIGHT_PLANES = 3, 4

#: Hides a slot from the softmax.
_HIDDEN = -1e30


@dataclass(frozen=True)
class IntegerAttention:
    """The sizes and inputs of one layer's attention. The mask is [B, 1, 1, C], 0 where a slot is seen."""

    builder: Builder
    heads: int
    kv_heads: int
    size: int
    scale: float
    key_scale: ir.Value
    value_scale: ir.Value
    used_B: ir.Value
    mask: ir.Value

    def __call__(
        self,
        query_B1M: ir.Value,
        key_B1M: ir.Value,
        value_B1M: ir.Value,
        key_cache: ir.Value,
        value_cache: ir.Value,
    ) -> list[ir.Value]:
        """Turned queries and keys in; [B, 1, heads * size] and both caches with the new token out."""
        keys = self._append(key_cache, key_B1M, self.key_scale)
        values = self._append(value_cache, value_B1M, self.value_scale)
        builder = self.builder
        scores = builder.op("Add", self._scores(query_B1M, keys), self.mask)
        out = self._weighted(builder.op("Softmax", scores, axis=-1), values)
        return [builder.reshape(out, [0, 1, self.heads * self.size]), keys, values]

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def _append(self, cache: ir.Value, new_B1M: ir.Value, scale: ir.Value) -> ir.Value:
        """The cache with the new token in its slot, rounded as GroupQueryAttention rounds it."""
        builder = self.builder
        flat = builder.shared("Reshape", scale, builder.ints(-1))
        # It multiplies by the inverse, which may fall on the other side of an edge than dividing.
        scaled = builder.op("Mul", new_B1M, builder.shared("Reciprocal", flat))
        one, zero = builder.floats(1.0), builder.constant(0, np.int8)
        rounded = builder.op("QuantizeLinear", scaled, one, zero)
        slot = builder.reshape(rounded, [0, self.kv_heads, 1, self.size])
        return builder.op("TensorScatter", cache, slot, self.used_B, axis=2)

    def _scores(self, query_B1M: ir.Value, keys: ir.Value) -> ir.Value:
        """Logits [B, K, G, C]."""
        builder = self.builder
        query = builder.reshape(query_B1M, [0, self.kv_heads, self.group, self.size])
        scale = builder.shared("Mul", self._by_head(self.key_scale), builder.floats(self.scale))
        query = builder.op("Mul", query, scale)
        largest = builder.op("Max", builder.op("Abs", query), builder.floats(1e-30))  # not 0
        planes, factor = self._planes(query, largest, _QUERY_PLANES, builder.constant(0, np.int8))
        # 128 more, seen as unsigned: the sum wraps around.
        shifted = builder.op("Add", keys, builder.constant(-128, np.int8))
        products = builder.op(
            "MatMulIntegerToFloat",
            builder.op("Cast", shifted, to=int(ir.DataType.UINT8)),
            builder.transpose(planes, 0, 1, 3, 2),
            builder.floats(1.0),
            builder.floats(1.0),
            builder.constant(128, np.uint8),
            domain=CONTRIB,
        )
        # Adds up the planes, gives them their scale, and turns [B, K, C, planes * G] into [B, K, G, C].
        joined = builder.op("Div", self._join(_QUERY_PLANES), factor)
        return builder.op("FusedMatMul", joined, products, domain=CONTRIB, transB=1)

    def _weighted(self, weights_BKGC: ir.Value, values: ir.Value) -> ir.Value:
        """The values' weighted sum [B, K, G, D]."""
        builder = self.builder
        offset = builder.constant(64, np.uint8)
        planes, factor = self._planes(weights_BKGC, weights_BKGC, _WEIGHT_PLANES, offset)
        sums = builder.op("MatMulInteger", planes, values, offset)
        sums = builder.op("Cast", sums, to=int(ir.DataType.FLOAT))
        out = builder.op("MatMul", self._join(_WEIGHT_PLANES), sums)
        return builder.op("Div", builder.op("Mul", out, self._by_head(self.value_scale)), factor)

    def _planes(
        self, x_BKGN: ir.Value, size_BKGN: ir.Value, count: int, offset: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """(planes of x [B, K, count * G, N], by what each row was multiplied [B, K, G, 1]).

        The largest of `size` is what a row's first plane has room for.
        """
        builder = self.builder
        top = builder.op("ReduceMax", size_BKGN, builder.ints(-1), keepdims=1)
        factor = builder.op("Div", builder.floats(_LIMIT), top)
        rest = builder.op("Mul", x_BKGN, factor)
        planes = []
        for index in range(count):
            step = builder.floats(_FINER**-index)
            planes.append(builder.op("QuantizeLinear", rest, step, offset))
            if index + 1 < count:
                rounded = builder.op("DequantizeLinear", planes[-1], step, offset)
                rest = builder.op("Sub", rest, rounded)
        return builder.op("Concat", *planes, axis=2), factor

    def _join(self, planes: int) -> ir.Value:
        """[G, planes * G]: times planes one below the other, it gives their sum."""
        parts = [np.eye(self.group) * _FINER**-index for index in range(planes)]
        return self.builder.constant(np.concatenate(parts, axis=1), np.float32)

    def _by_head(self, scale_KD: ir.Value) -> ir.Value:
        shape = self.builder.ints(self.kv_heads, 1, self.size)
        return self.builder.shared("Reshape", scale_KD, shape)


def pays(builder: Builder, new: ir.Value, longest: ir.Value, slots: ir.Value) -> ir.Value:
    """Whether a step goes this way: of its new tokens, the longest total length and the slots, each [1]."""
    used = builder.shared("Mul", longest, builder.ints(3))
    needed = builder.shared("Mul", slots, builder.ints(_USED_THIRDS))
    conditions = [
        builder.shared("Equal", new, builder.ints(1)),
        builder.shared("GreaterOrEqual", longest, builder.ints(FEWEST_TOKENS)),
        builder.shared("Less", longest, builder.ints(_MOST_TOKENS)),
        builder.shared("GreaterOrEqual", used, needed),
    ]
    found = conditions[0]
    for other in conditions[1:]:
        found = builder.shared("And", found, other)
    return found


def mask(builder: Builder, used_B: ir.Value, slots: ir.Value, wanted: ir.Value) -> ir.Value:
    """[B, 1, 1, slots]: 0 for slots up to the new token's, far below for the others.

    One for all layers, and of a single slot where it is not wanted.
    """
    count = builder.shared("Where", wanted, slots, builder.ints(1))
    zero, one = (builder.constant(value, np.int64) for value in (0, 1))
    index = builder.shared("Range", zero, builder.shared("Squeeze", count), one)
    newest = builder.shared("Reshape", used_B, builder.ints(-1, 1, 1, 1))
    seen = builder.shared("LessOrEqual", index, newest)
    return builder.shared("Where", seen, builder.floats(0.0), builder.floats(_HIDDEN))
