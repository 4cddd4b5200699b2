"""Attention over packed tokens of 4 bits and over slots, as `ir/kv/store/turboquant` stores them.

    b           a byte: the code of channel 2j in its low half, that of 2j + 1 in its high half
    a           16 b mod 256: 16 times the low code; 16 times the high code is b - a / 16
    logit       scale / 16 ((q_even - q_odd / 16) . (a - 128) + q_odd . (b - 128) + 8 sum(q_even)) + q . mean
    out_even    sum(w (a - 128)) / 16 + sum(w) / 2                       w: weights times the values' scales
    out_odd     (sum(w (b - 128)) - sum(w (a - 128)) / 16) / 16

A step of one token multiplies bytes by queries and weights in planes of integers (`integer_attention.py`), by
blocks of granules that are merged by their maxima and sums. Codes are taken apart by a product by 16, which
wraps around: onnxruntime computes that in vectors, and BitwiseAnd and BitShift a byte at a time. A step of
several tokens, which a prompt's own are not, widens one layer's packed tokens to float32, and no other
layer's meanwhile.

Shape suffixes: B rows, K KV heads, G query heads of each, S new tokens, D numbers of a head, C slots, M
granules, T tokens of a granule, N blocks, P tokens of a block, X = M T packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .builder import CONTRIB, Builder
from .integer_attention import BLOCK, FINER, LEVELS, query_planes, weight_planes

#: Hides a key from the softmax.
_HIDDEN = -1e30

#: What bytes have added to them where both factors of a product are unsigned.
_MIDDLE = 128

#: Granules of a block are at most so many: numbers that a model divides by are few constants (`divisors.py`).
_COUNTS = 64

#: A code of a half, and what a level is less than its code.
_HALVES, _OFFSET = 16.0, 7.5


@dataclass(frozen=True)
class Partial:
    """Attention over some of the keys: about the largest logit, the sum of exp(logit - most) and that of them
    times the values, [B, K, G, S, 1], [B, K, G, S, 1] and [B, K, G, S, D]."""

    most: ir.Value
    total: ir.Value
    values: ir.Value

    def parts(self) -> list[ir.Value]:
        return [self.most, self.total, self.values]

    def merged(self, builder: Builder, other: Partial) -> Partial:
        """The state over the keys of both."""
        most = builder.op("Max", self.most, other.most)
        mine, theirs = (
            builder.op("Exp", builder.op("Sub", part.most, most)) for part in (self, other)
        )

        def both(one: ir.Value, two: ir.Value) -> ir.Value:
            return builder.op("Add", builder.op("Mul", one, mine), builder.op("Mul", two, theirs))

        return Partial(most, both(self.total, other.total), both(self.values, other.values))


@dataclass(frozen=True)
class PackedAttention:
    """One call's: sizes, how many tokens of each row are packed, and their pieces by name, [B, K, M, rows,
    width] each. `leader` is a piece of the first call that goes by the same counters: what depends on sizes
    alone is made once."""

    builder: Builder
    heads: int
    kv_heads: int
    size: int
    granule: int
    scale: float
    softcap: float
    packed_B: ir.Value
    pieces: dict[str, ir.Value]
    leader: ir.Value

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def any_packed(self) -> ir.Value:
        """Whether some row has packed tokens."""
        most = self.builder.shared("ReduceMax", self.packed_B, keepdims=0)
        return self.builder.shared("Greater", most, self.builder.constant(0, np.int64))

    def query(self, query_BSM: ir.Value) -> ir.Value:
        """Turned queries [B, S, heads * size] as [B, K, G, S, D], times the softmax's scale."""
        builder = self.builder
        apart = builder.reshape(query_BSM, [0, 0, self.kv_heads, self.group, self.size])
        scaled = builder.op("Mul", apart, builder.floats(self.scale))
        return builder.transpose(scaled, 0, 2, 3, 1, 4)

    def over_slots(
        self,
        query_BKGSD: ir.Value,
        keys_BKCD: ir.Value,
        values_BKCD: ir.Value,
        visible_B1SC: ir.Value,
    ) -> Partial:
        """The state over the slots that are visible, of which a query has one at least."""
        builder = self.builder
        keys, values = (
            builder.op("Unsqueeze", slots, builder.ints(2)) for slots in (keys_BKCD, values_BKCD)
        )
        logits = self._capped(self._product(query_BKGSD, keys))
        visible = builder.shared("Unsqueeze", visible_B1SC, builder.ints(2))
        return self._partial(builder.op("Where", visible, logits, builder.floats(_HIDDEN)), values)

    def over_packed(self, query_BKGSD: ir.Value, new: ir.Value) -> Partial:
        """The state over the packed tokens; `new` counts the new ones, [1]."""
        builder = self.builder
        alone = builder.shared("Equal", new, builder.ints(1))
        return Partial(
            *builder.choose(
                alone,
                lambda: self.in_integers(query_BKGSD).parts(),
                lambda: self.widened(query_BKGSD).parts(),
            )
        )

    def in_integers(self, query_BKG1D: ir.Value) -> Partial:
        """The state over the packed tokens, of one new token."""
        builder = self.builder
        query = builder.reshape(query_BKG1D, [0, 0, self.group, self.size])
        logits = self._logits(query)
        shift, weights, total = self._weights(logits)
        scale = self._blocks(self._wide("value_scale"), 1)
        largest = builder.op("ReduceMax", scale, builder.ints(-1), keepdims=1)
        largest = builder.op("Max", largest, builder.floats(1e-30))  # not 0
        weights = builder.op("Mul", weights, builder.op("Div", scale, largest))
        # Blocks are merged by what their largest is of the largest of all.
        highest = builder.op("ReduceMax", shift, builder.ints(2), keepdims=0)
        share = builder.op(
            "Exp", builder.op("Sub", shift, builder.op("Unsqueeze", highest, builder.ints(2)))
        )
        values = self._values(weights, builder.op("Mul", share, largest))
        total = self._over_blocks(builder.op("Mul", total, share))
        found = (builder.op("Unsqueeze", x, builder.ints(3)) for x in (highest, total, values))
        return Partial(*found)

    def widened(self, query_BKGSD: ir.Value) -> Partial:
        """The state over the packed tokens in float32, of any number of new ones."""
        builder = self.builder
        parts = self._parts(query_BKGSD)
        query = builder.op("Concat", *parts, axis=-1)
        mean = builder.op("Concat", *self._parts(self._wide("key_mean")), axis=-1)
        keys_BKXD = builder.op("Add", self._numbers("key"), mean)
        keys, values = (
            builder.reshape(x, [0, 0, 1, -1, self.size])
            for x in (keys_BKXD, self._numbers("value"))
        )
        logits = self._capped(self._product(query, keys))
        hidden = builder.shared("Reshape", self._hidden(), builder.ints(0, 1, 1, -1, 1))
        by_token = builder.shared("Expand", hidden, builder.ints(1, 1, 1, 1, self.granule))
        by_token = builder.shared("Reshape", by_token, builder.ints(0, 1, 1, 1, -1))
        state = self._partial(builder.op("Add", logits, by_token), values)
        halves = builder.split(state.values, [self.size // 2] * 2, axis=-1)
        return Partial(state.most, state.total, self._joined(*halves))

    def output(self, state: Partial, sinks_H: ir.Value | None) -> ir.Value:
        """What attention gives, [B, S, heads * size], of the state over all keys but the sinks."""
        builder = self.builder
        if sinks_H is not None:
            sink = builder.reshape(sinks_H, [1, self.kv_heads, self.group, 1, 1])
            one, none = builder.floats([1.0]), builder.floats([0.0])
            state = state.merged(builder, Partial(sink, one, none))
        out = builder.transpose(builder.op("Div", state.values, state.total), 0, 3, 1, 2, 4)
        return builder.reshape(out, [0, 0, self.heads * self.size])

    def _logits(self, query_BKGD: ir.Value) -> ir.Value:
        """Of every packed token, [B, K, N, G, P]; what a row has not is hidden."""
        builder, group = self.builder, self.group
        even, odd = self._parts(query_BKGD)
        low = builder.op("Sub", even, builder.op("Mul", odd, builder.floats(1 / _HALVES)))
        planes, factor = query_planes(builder, builder.op("Concat", low, odd, axis=3))
        products = builder.op(
            "MatMulIntegerToFloat",
            builder.op("Concat", *self._halves("key"), axis=3),
            builder.transpose(planes, 0, 1, 3, 2),
            builder.floats(1.0),
            builder.floats(1.0),
            builder.constant(_MIDDLE, np.uint8),
            domain=CONTRIB,
        )
        # Adds up the planes, gives them their scale, and turns [.., P, 2 G] into [.., G, P].
        both = np.concatenate([np.eye(group), np.eye(group) / FINER], axis=1) / _HALVES
        join = builder.op("Div", builder.constant(both, np.float32), factor)
        join = builder.reshape(join, [0, 0, 1, group, 2 * group])
        products = self._blocks(products, last=2 * group)
        found = builder.op("FusedMatMul", join, products, domain=CONTRIB, transB=1)
        sums = builder.op("ReduceSum", even, builder.ints(3), keepdims=1)
        sums = builder.op("Mul", sums, builder.floats(0.5))
        found = builder.op("Add", found, builder.op("Unsqueeze", sums, builder.ints(2)))
        found = builder.op("Mul", found, self._blocks(self._wide("key_scale"), 1))
        by_granule = self._of_means(query_BKGD)
        hidden = self._by_granule(self._hidden(), 1)
        if not self.softcap:
            by_granule = builder.op("Add", by_granule, hidden)
        found = builder.op("Add", self._cut(found, 6), by_granule)
        if self.softcap:
            found = builder.op("Add", self._capped(found), hidden)
        return self._cut(found, 5)

    def _of_means(self, query_BKGD: ir.Value) -> ir.Value:
        """What the means of keys are to each granule's logits, [B, K, N, G, granules of a block, 1]."""
        builder = self.builder
        means = self._by_granule(builder.reshape(self._wide("key_mean"), [0, 0, -1, self.size]), 0)
        query = builder.op("Unsqueeze", query_BKGD, builder.ints(2))
        found = builder.op("FusedMatMul", query, means, domain=CONTRIB, transB=1)
        return builder.op("Unsqueeze", found, builder.ints(5))

    def _weights(self, logits_BKNGP: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(shift of each block, exp(logit - shift), their sum); the largest is what the first plane has room
        for."""
        builder = self.builder
        most = builder.op("ReduceMax", logits_BKNGP, builder.ints(-1), keepdims=1)
        shift = builder.op("Sub", most, builder.floats(float(np.log(LEVELS))))
        weights = builder.op("Exp", builder.op("Sub", logits_BKNGP, shift))
        return shift, weights, builder.op("ReduceSum", weights, builder.ints(-1), keepdims=1)

    def _values(self, weights_BKNGP: ir.Value, share_BKNG1: ir.Value) -> ir.Value:
        """Weighted sums over all blocks, [B, K, G, D]; a block counts by its share."""
        builder, group = self.builder, self.group
        planes = weight_planes(builder, weights_BKNGP)
        sums = [
            builder.op(
                "MatMulIntegerToFloat",
                planes,
                self._blocks(half, last=self.size // 2),
                builder.floats(1.0),
                builder.floats(1.0),
                None,
                builder.constant(_MIDDLE, np.uint8),
                domain=CONTRIB,
            )
            for half in self._halves("value")
        ]
        finer = builder.op("Mul", share_BKNG1, builder.floats(1 / LEVELS))
        shares = builder.op("Concat", share_BKNG1, finer, axis=3)
        low, byte = (
            self._over_blocks(
                builder.reshape(builder.op("Mul", part, shares), [0, 0, -1, group, self.size // 2])
            )
            for part in sums
        )
        whole = builder.op("ReduceSum", weights_BKNGP, builder.ints(-1), keepdims=1)
        whole = self._over_blocks(builder.op("Mul", whole, share_BKNG1))
        low = builder.op("Mul", low, builder.floats(1 / _HALVES))
        even = builder.op("Add", low, builder.op("Mul", whole, builder.floats(0.5)))
        odd = builder.op("Mul", builder.op("Sub", byte, low), builder.floats(1 / _HALVES))
        return self._joined(even, odd)

    def _partial(self, logits_BKGSX: ir.Value, values_BK1XD: ir.Value) -> Partial:
        builder = self.builder
        most = builder.op("ReduceMax", logits_BKGSX, builder.ints(-1), keepdims=1)
        weights = builder.op("Exp", builder.op("Sub", logits_BKGSX, most))
        total = builder.op("ReduceSum", weights, builder.ints(-1), keepdims=1)
        return Partial(most, total, builder.op("MatMul", weights, values_BK1XD))

    def _capped(self, logits: ir.Value) -> ir.Value:
        builder = self.builder
        if not self.softcap:
            return logits
        cap = builder.floats(self.softcap)
        return builder.op("Mul", builder.op("Tanh", builder.op("Div", logits, cap)), cap)

    def _product(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """a times b with its last two axes swapped."""
        return self.builder.op("FusedMatMul", a, b, domain=CONTRIB, transB=1)

    # Codes.

    def _bytes(self, part: str) -> ir.Value:
        """The codes of keys or of values, two a byte, [B, K, X, D / 2]."""
        return self.builder.reshape(self.pieces[f"{part}_codes"], [0, 0, -1, self.size // 2])

    def _halves(self, part: str) -> tuple[ir.Value, ir.Value]:
        """`a` and `b` of the formula."""
        stored = self._bytes(part)
        low = self.builder.op("Mul", stored, self.builder.constant(int(_HALVES), np.uint8))
        return low, stored

    def _numbers(self, part: str) -> ir.Value:
        """What codes stand for but for a mean, [B, K, M, T, D], even channels before odd ones."""
        builder = self.builder
        stored = builder.op("Cast", self.pieces[f"{part}_codes"], to=int(ir.DataType.FLOAT))
        high = builder.op("Floor", builder.op("Mul", stored, builder.floats(1 / _HALVES)))
        low = builder.op("Sub", stored, builder.op("Mul", high, builder.floats(_HALVES)))
        codes = builder.op("Concat", low, high, axis=-1)
        levels = builder.op("Sub", codes, builder.floats(_OFFSET))
        return builder.op("Mul", levels, self._wide(f"{part}_scale"))

    def _wide(self, name: str) -> ir.Value:
        """A piece of float16 in float32, [B, K, M, rows, width]."""
        return self.builder.op("Cast", self.pieces[name], to=int(ir.DataType.FLOAT))

    def _parts(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The even and the odd channels of the last axis, [.., D / 2] each."""
        builder = self.builder
        pairs = builder.op("Concat", builder.op("Shape", x, end=-1), builder.ints(-1, 2), axis=0)
        even, odd = builder.split(builder.op("Reshape", x, pairs), [1, 1], axis=-1)
        last = builder.ints(-1)
        return builder.op("Squeeze", even, last), builder.op("Squeeze", odd, last)

    def _joined(self, even: ir.Value, odd: ir.Value) -> ir.Value:
        """Channels side by side again, [.., D]."""
        builder = self.builder
        last = builder.ints(-1)
        pairs = (builder.op("Unsqueeze", part, last) for part in (even, odd))
        whole = builder.op("Concat", builder.op("Shape", even, end=-1), builder.ints(-1), axis=0)
        return builder.op("Reshape", builder.op("Concat", *pairs, axis=-1), whole)

    # Blocks.

    def _granules(self) -> ir.Value:
        """Granules that there is room for, [1]."""
        return self.builder.dim(self.leader, 2)

    def _each(self) -> ir.Value:
        """Granules of a block, [1]: as many as divide all, up to `BLOCK` tokens."""
        builder = self.builder
        counts = builder.ints(*range(1, min(_COUNTS, max(1, BLOCK // self.granule)) + 1))
        beyond = builder.shared("Mod", self._granules(), counts)
        divides = builder.shared("Equal", beyond, builder.ints(0))
        found = builder.shared("Where", divides, counts, builder.ints(1))
        return builder.shared("ReduceMax", found, keepdims=1)

    def _tokens(self) -> ir.Value:
        """Tokens of a block, [1]."""
        return self.builder.shared("Mul", self._each(), self.builder.ints(self.granule))

    def _blocks(self, x: ir.Value, rows: int = 0, last: int = 0) -> ir.Value:
        """What there is of each token by blocks: [B, K, N, rows, P], or [B, K, N, P, last]."""
        builder = self.builder
        tail = (
            [self._tokens(), builder.ints(last)] if last else [builder.ints(rows), self._tokens()]
        )
        shape = builder.shared("Concat", builder.ints(0, 0, -1), *tail, axis=0)
        return builder.op("Reshape", x, shape)

    def _by_granule(self, x: ir.Value, rows: int) -> ir.Value:
        """What there is of each granule by blocks: [B, K, N, rows, M / N, 1], or [B, K, N, M / N, D]."""
        builder = self.builder
        tail = (
            [builder.ints(rows), self._each(), builder.ints(1)]
            if rows
            else [self._each(), builder.ints(self.size)]
        )
        shape = builder.shared("Concat", builder.ints(0, 0, -1), *tail, axis=0)
        return builder.op("Reshape", x, shape)

    def _cut(self, x: ir.Value, axes: int) -> ir.Value:
        """Logits by blocks as [B, K, N, G, granules, T], or as [B, K, N, G, P]."""
        builder = self.builder
        tail = [self._each(), builder.ints(self.granule)] if axes == 6 else [self._tokens()]
        shape = builder.shared("Concat", builder.ints(0, 0, 0, 0), *tail, axis=0)
        return builder.op("Reshape", x, shape)

    def _hidden(self) -> ir.Value:
        """What hides the granules that a row has not packed, [B, 1, M]; one for all layers."""
        builder = self.builder
        zero, one = (builder.constant(value, np.int64) for value in (0, 1))
        index = builder.shared("Range", zero, builder.shared("Squeeze", self._granules()), one)
        first = builder.shared("Mul", index, builder.ints(self.granule))
        count = builder.shared("Unsqueeze", self.packed_B, builder.ints(1, 2))
        held = builder.shared("Less", first, count)
        return builder.shared("Where", held, builder.floats(0.0), builder.floats(_HIDDEN))

    def _over_blocks(self, x: ir.Value) -> ir.Value:
        return self.builder.op("ReduceSum", x, self.builder.ints(2), keepdims=0)
