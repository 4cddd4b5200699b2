"""Attention over packed tokens of 4 bits and over slots, as `ir/kv/store/turboquant` and `abq` store them.

    b           a byte: the code of channel 2j in its low half, that of 2j + 1 in its high half
    a           16 b mod 256: 16 times the low code; 16 times the high code is b - a / 16
    logit       scale / 16 ((q_even - q_odd / 16) . (a - 128) + q_odd . (b - 128) + 8 sum(q_even)) + q . mean
    out_even    sum(w (a - 128)) / 16 + sum(w) / 2                       w: weights times the values' scales
    out_odd     (sum(w (b - 128)) - sum(w (a - 128)) / 16) / 16

This is of levels code - 7.5, under one scale a token, with a mean of a granule's keys. Of mantissas, code -
8, there is half of every q and w less, and no mean. Where blocks of channels have scales of their own, each
query stands there once for each block, of whose channels alone it has numbers; so do the weights, times the
scales of their block.

A step of one token multiplies bytes by queries and weights in planes of integers (`integer_attention.py`), by
blocks of granules that are merged by their maxima and sums. Codes are taken apart by a product by 16, which
wraps around: onnxruntime computes that in vectors, and BitwiseAnd and BitShift a byte at a time. A step of
several tokens, which a prompt's own are not, widens one layer's packed tokens to float32, and no other
layer's meanwhile.

Shape suffixes: B rows, K KV heads, G query heads of each, S new tokens, D numbers of a head, C slots, M
granules, T tokens of a granule, N blocks, P tokens of a block, X = M T packed tokens, E blocks of channels,
R = G E rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.kv.codes.block_float import BIAS
from .builder import CONTRIB, Builder
from .integer_attention import BLOCK, LEVELS, adds_up, query_planes, weight_planes
from .one_token import HIDDEN, capped

#: What bytes have added to them where both factors of a product are unsigned.
_MIDDLE = 128

#: Granules of a block are at most so many: numbers that a model divides by are few constants (`divisors.py`).
_COUNTS = 64

#: A code of a half, and what even levels and mantissas are less than their codes.
_HALVES, _LEVELS_LESS, _MANTISSAS_LESS = 16.0, 7.5, 8.0


@dataclass(frozen=True)
class Partial:
    """Attention over some of the keys: about the largest logit, the sum of exp(logit - most) and that of them
    times the values, [.., 1], [.., 1] and [.., D]."""

    most: ir.Value
    total: ir.Value
    values: ir.Value

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
    blocks: int = 1
    """Blocks of channels, each with scales of its own."""

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Query heads of a KV head, each once for every block of channels."""
        return self.group * self.blocks

    @property
    def less(self) -> float:
        """What is taken from codes."""
        return _MANTISSAS_LESS if "key_exponent" in self.pieces else _LEVELS_LESS

    @property
    def centred(self) -> bool:
        """Whether the mean of a granule's keys stands apart."""
        return "key_mean" in self.pieces

    def any_packed(self) -> ir.Value:
        """Whether some row has packed tokens."""
        most = self.builder.shared("ReduceMax", self.packed_B, keepdims=0)
        return self.builder.shared("Greater", most, self.builder.constant(0, np.int64))

    def __call__(
        self,
        query_BSM: ir.Value,
        keys_BKCD: ir.Value,
        values_BKCD: ir.Value,
        visible_B1SC: ir.Value,
        new: ir.Value,
        sinks_H: ir.Value | None,
    ) -> ir.Value:
        """Turned queries, slots that hold the new tokens already, which of them each query sees, and how many
        tokens are new, [1]; gives [B, S, heads * size]."""
        builder, given = self.builder, (query_BSM, keys_BKCD, values_BKCD, visible_B1SC, sinks_H)
        alone, held = builder.shared("Equal", new, builder.ints(1)), self._held()
        ways = (lambda: [held._one(*given)], lambda: [held._several(*given)])
        return builder.choose(alone, *ways)[0]

    def _held(self) -> PackedAttention:
        """The same over the blocks that some row has packed tokens in, however many there is room for."""
        builder = self.builder
        end, axis = self._granules(), builder.ints(2)
        cut = {
            n: builder.op("Slice", x, builder.ints(0), end, axis) for n, x in self.pieces.items()
        }
        return replace(self, pieces=cut)

    def _one(
        self,
        query_B1M: ir.Value,
        keys: ir.Value,
        values: ir.Value,
        visible_B11C: ir.Value,
        sinks_H: ir.Value | None,
    ) -> ir.Value:
        """Of one new token: packed tokens by integers."""
        builder = self.builder
        query = builder.reshape(query_B1M, [0, self.kv_heads, self.group, self.size])
        logits = self._capped(self._product(query, keys, self.scale))
        logits = builder.op("Where", visible_B11C, logits, builder.floats(HIDDEN))
        state = self._partial(logits, values).merged(builder, self._in_integers(query))
        out = self._divided(state, sinks_H, [1, self.kv_heads, self.group, 1])
        return builder.reshape(out, [0, 1, self.heads * self.size])

    def _several(
        self,
        query_BSM: ir.Value,
        keys: ir.Value,
        values: ir.Value,
        visible_B1SC: ir.Value,
        sinks_H: ir.Value | None,
    ) -> ir.Value:
        """Of any number of new tokens: packed ones in float32."""
        builder = self.builder
        apart = builder.reshape(query_BSM, [0, 0, self.kv_heads, self.group, self.size])
        query = builder.transpose(apart, 0, 2, 3, 1, 4)
        slots = [builder.op("Unsqueeze", each, builder.ints(2)) for each in (keys, values)]
        logits = self._capped(self._product(query, slots[0], self.scale))
        visible = builder.shared("Unsqueeze", visible_B1SC, builder.ints(2))
        logits = builder.op("Where", visible, logits, builder.floats(HIDDEN))
        state = self._partial(logits, slots[1]).merged(builder, self._widened(query))
        out = self._divided(state, sinks_H, [1, self.kv_heads, self.group, 1, 1])
        out = builder.transpose(out, 0, 3, 1, 2, 4)
        return builder.reshape(out, [0, 0, self.heads * self.size])

    def _divided(self, state: Partial, sinks_H: ir.Value | None, dims: list[int]) -> ir.Value:
        """What attention gives of the state over all keys but the sinks, which have these dims."""
        builder = self.builder
        if sinks_H is not None:
            one, none = builder.floats([1.0]), builder.floats([0.0])
            state = state.merged(builder, Partial(builder.reshape(sinks_H, dims), one, none))
        return builder.op("Div", state.values, state.total)

    def _partial(self, logits: ir.Value, values: ir.Value) -> Partial:
        builder = self.builder
        most = builder.op("ReduceMax", logits, builder.ints(-1), keepdims=1)
        weights = builder.op("Exp", builder.op("Sub", logits, most))
        total = builder.op("ReduceSum", weights, builder.ints(-1), keepdims=1)
        return Partial(most, total, builder.op("MatMul", weights, values))

    def _widened(self, query_BKGSD: ir.Value) -> Partial:
        """The state over the packed tokens in float32; heads have their even channels before the odd ones."""
        builder, order = self.builder, self._matrix(_even_first(self.size))
        parts = [self._numbers("key"), self._numbers("value")]
        if self.centred:
            mean = builder.op("MatMul", self._wide("key_mean"), order)
            parts[0] = builder.op("Add", parts[0], mean)
        keys, values = (builder.reshape(part, [0, 0, 1, -1, self.size]) for part in parts)
        query = builder.op("MatMul", query_BKGSD, order)
        logits = self._capped(self._product(query, keys, self.scale))
        hidden = builder.shared("Reshape", self._hidden(), builder.ints(0, 1, 1, -1, 1))
        by_token = builder.shared("Expand", hidden, builder.ints(1, 1, 1, 1, self.granule))
        by_token = builder.shared("Reshape", by_token, builder.ints(0, 1, 1, 1, -1))
        state = self._partial(builder.op("Add", logits, by_token), values)
        back = self._matrix(_even_first(self.size).T)
        return Partial(state.most, state.total, builder.op("MatMul", state.values, back))

    def _numbers(self, part: str) -> ir.Value:
        """What codes stand for but for a mean, [B, K, M, T, D], even channels before odd ones; or, of blocks
        of channels, [B, K, X, 2, E, D / 2 E]."""
        builder = self.builder
        stored = builder.op("Cast", self.pieces[f"{part}_codes"], to=int(ir.DataType.FLOAT))
        high = builder.op("Floor", builder.op("Mul", stored, builder.floats(1 / _HALVES)))
        low = builder.op("Sub", stored, builder.op("Mul", high, builder.floats(_HALVES)))
        codes = builder.op("Concat", low, high, axis=-1)
        levels, scales = builder.op("Sub", codes, builder.floats(self.less)), self._scales(part)
        if self.blocks > 1:
            each = self.size // (2 * self.blocks)
            levels = builder.reshape(levels, [0, 0, -1, 2, self.blocks, each])
            scales = builder.reshape(scales, [0, 0, -1, 1, self.blocks, 1])
        return builder.op("Mul", levels, scales)

    def _scales(self, part: str) -> ir.Value:
        """Of each token and block of channels, [B, K, M, T, E]."""
        if f"{part}_exponent" not in self.pieces:
            return self._wide(f"{part}_scale")
        exponent = self.builder.op(
            "Sub", self._wide(f"{part}_exponent"), self.builder.floats(float(BIAS))
        )
        log = self.builder.op("Mul", exponent, self.builder.floats(float(np.log(2))))
        return self.builder.op("Exp", log)

    def _in_integers(self, query_BKGD: ir.Value) -> Partial:
        """The state over the packed tokens, of one new token."""
        builder = self.builder
        logits = self._logits(query_BKGD)
        # The largest weight of a block is what the first plane has room for.
        most = builder.op("ReduceMax", logits, builder.ints(-1), keepdims=1)
        shift = builder.op("Sub", most, builder.floats(float(np.log(LEVELS))))
        weights = builder.op("Exp", builder.op("Sub", logits, shift))
        total = builder.op("ReduceSum", weights, builder.ints(-1), keepdims=1)
        weights = self._times_scales(weights, "value")
        # And again, for what is looked at most may have the smallest values.
        largest = builder.op("ReduceMax", weights, builder.ints(-1), keepdims=1)
        largest = builder.op("Max", largest, builder.floats(1e-30))  # not 0
        largest = builder.op("Div", largest, builder.floats(LEVELS))
        weights = builder.op("Div", weights, largest)
        # Blocks are merged by what their largest is of the largest of all.
        highest = builder.op("ReduceMax", shift, builder.ints(2), keepdims=1)
        share = builder.op("Exp", builder.op("Sub", shift, highest))
        values = self._values(weights, self._by_row(share, largest))
        total = self._over_blocks(builder.op("Mul", total, share))
        return Partial(builder.op("Squeeze", highest, builder.ints(2)), total, values)

    def _logits(self, query_BKGD: ir.Value) -> ir.Value:
        """Of every packed token, [B, K, N, G, P]; what a row has not is hidden."""
        builder, rows = self.builder, self.rows
        by_block = self.scale * _by_blocks(_query(self.size), self.blocks)
        for_halves = builder.op("MatMul", query_BKGD, self._matrix(by_block))
        for_halves = builder.reshape(for_halves, [0, 0, rows, self.size])
        planes, factor = query_planes(builder, for_halves)
        codes = builder.op("Concat", *self._halves("key", [0, 0, -1, self.size // 2]), axis=3)
        products = builder.op(
            "MatMulIntegerToFloat",
            codes,
            builder.transpose(planes, 0, 1, 3, 2),
            builder.floats(1.0),
            builder.floats(1.0),
            builder.constant(_MIDDLE, np.uint8),
            domain=CONTRIB,
        )
        # Adds up the planes, gives them their scale, and turns [.., P, 2 R] into [.., R, P].
        join = builder.reshape(adds_up(builder, factor, rows), [0, 0, 1, rows, 2 * rows])
        found = builder.op(
            "FusedMatMul", join, self._blocks(products, last=2 * rows), domain=CONTRIB, transB=1
        )
        query = builder.op("Unsqueeze", query_BKGD, builder.ints(2))
        middle = builder.op("MatMul", query, self._matrix(self.scale * self._middle()))
        middle = builder.reshape(middle, [0, 0, 1, rows, 1])
        found = self._added(self._times_scales(builder.op("Add", found, middle), "key"))
        return self._cut(self._seen(query, self._cut(found, 6)), 5)

    def _seen(self, query_BK1GD: ir.Value, logits: ir.Value) -> ir.Value:
        """Logits by granule, less what codes and scales say: with those of the means of keys, of which there
        is a number a granule, as there is of what is hidden."""
        builder, hidden = self.builder, self._by_granule(self._hidden(), 1)
        if self.centred:
            means = self._by_granule(self._wide("key_mean"), 0)
            means = self._product(query_BK1GD, means, self.scale)
            granules = builder.op("Unsqueeze", means, builder.ints(5))
            if not self.softcap:
                granules = builder.op("Add", granules, hidden)
            logits = builder.op("Add", logits, granules)
        elif not self.softcap:
            logits = builder.op("Add", logits, hidden)
        return builder.op("Add", self._capped(logits), hidden) if self.softcap else logits

    def _middle(self) -> Any:
        """What products of halves lack of levels or mantissas, for each block of channels, [D, E]."""
        lacks = np.tile([8.0 - self.less, 7.5 - self.less], self.size // 2)
        return lacks[:, None] * _channels(self.size, self.blocks).T

    def _times_scales(self, x_BKNRP: ir.Value, part: str) -> ir.Value:
        """Rows of each token times the scales of their block of channels, [B, K, N, R, P]; of values one row
        for all blocks is given, [B, K, N, G, P]."""
        builder, scales = self.builder, self._scales(part)
        if self.blocks == 1:
            return builder.op("Mul", x_BKNRP, self._blocks(scales, 1))
        scales = builder.transpose(self._blocks(scales, last=self.blocks), 0, 1, 2, 4, 3)
        scales = builder.op("Unsqueeze", scales, builder.ints(3))
        shape = builder.ints(0, 0, 0, self.group, -1 if part == "key" else 1)
        shape = builder.shared("Concat", shape, self._tokens(), axis=0)
        found = builder.op("Mul", builder.op("Reshape", x_BKNRP, shape), scales)
        return self._blocks(found, self.rows)

    def _added(self, x_BKNRP: ir.Value) -> ir.Value:
        """The sum over blocks of channels, [B, K, N, G, P]."""
        if self.blocks == 1:
            return x_BKNRP
        builder = self.builder
        shape = builder.ints(0, 0, 0, self.group, self.blocks)
        shape = builder.shared("Concat", shape, self._tokens(), axis=0)
        apart = builder.op("Reshape", x_BKNRP, shape)
        return builder.op("ReduceSum", apart, builder.ints(4), keepdims=0)

    def _by_row(self, share_BKNG1: ir.Value, largest_BKNR1: ir.Value) -> ir.Value:
        """Both multiplied, [B, K, N, R, 1]."""
        builder = self.builder
        if self.blocks == 1:
            return builder.op("Mul", share_BKNG1, largest_BKNR1)
        apart = builder.reshape(largest_BKNR1, [0, 0, 0, self.group, self.blocks])
        return builder.reshape(builder.op("Mul", share_BKNG1, apart), [0, 0, 0, self.rows, 1])

    def _values(self, weights_BKNRP: ir.Value, share_BKNR1: ir.Value) -> ir.Value:
        """Weighted sums over all blocks, [B, K, G, D]; a block counts by its share."""
        builder, half = self.builder, self.size // 2
        planes = weight_planes(builder, weights_BKNRP)
        sums = [
            builder.op(
                "MatMulIntegerToFloat",
                planes,
                stored,
                builder.floats(1.0),
                builder.floats(1.0),
                None,
                builder.constant(_MIDDLE, np.uint8),
                domain=CONTRIB,
            )
            for stored in self._halves("value", self._shape(last=half))
        ]
        finer = builder.op("Mul", share_BKNR1, builder.floats(1 / LEVELS))
        shares = builder.op("Concat", share_BKNR1, finer, axis=3)
        found = builder.op("Mul", builder.op("Concat", *sums, axis=4), shares)
        found = self._over_blocks(builder.reshape(found, [0, 0, -1, self.rows, self.size]))
        whole = builder.op("ReduceSum", weights_BKNRP, builder.ints(-1), keepdims=1)
        whole = self._over_blocks(builder.op("Mul", whole, share_BKNR1))
        lacks = np.tile([8.0 - self.less, 7.5 - self.less], half)
        middle = builder.op("Mul", whole, self._matrix(lacks))
        found = builder.op("MatMul", found, self._matrix(_values(self.size)))
        return self._own_channels(builder.op("Add", found, middle))

    def _own_channels(self, x_BKRD: ir.Value) -> ir.Value:
        """Of the row of each block of channels those channels, [B, K, G, D]."""
        if self.blocks == 1:
            return x_BKRD
        builder = self.builder
        apart = builder.reshape(x_BKRD, [0, 0, self.group, self.blocks, self.size])
        own = builder.op("Mul", apart, self._matrix(_channels(self.size, self.blocks)))
        return builder.op("ReduceSum", own, builder.ints(3), keepdims=0)

    def _capped(self, logits: ir.Value) -> ir.Value:
        return capped(self.builder, logits, self.softcap)

    def _product(self, a: ir.Value, b: ir.Value, factor: float) -> ir.Value:
        """a times b with its last two axes swapped, times a factor."""
        return self.builder.op("FusedMatMul", a, b, domain=CONTRIB, transB=1, alpha=factor)

    def _matrix(self, values: Any) -> ir.Value:
        return self.builder.constant(values, np.float32)

    def _halves(self, part: str, shape: list[int] | ir.Value) -> tuple[ir.Value, ir.Value]:
        """`a` and `b` of the formula, of keys or of values."""
        builder, stored = self.builder, self.pieces[f"{part}_codes"]
        dims = builder.ints(*shape) if isinstance(shape, list) else shape
        stored = builder.op("Reshape", stored, dims)
        low = builder.op("Mul", stored, builder.constant(int(_HALVES), np.uint8))
        return low, stored

    def _wide(self, name: str) -> ir.Value:
        """A piece in float32, [B, K, M, rows, width]."""
        return self.builder.op("Cast", self.pieces[name], to=int(ir.DataType.FLOAT))

    def _granules(self) -> ir.Value:
        """Granules that are read, [1]: those of the row that has most, up to a whole block."""
        builder, whole = self.builder, max(1, BLOCK // self.granule) * self.granule
        most = builder.shared("ReduceMax", self.packed_B, keepdims=1)
        blocks = builder.shared(
            "Div", builder.shared("Add", most, builder.ints(whole - 1)), builder.ints(whole)
        )
        count = builder.shared("Mul", blocks, builder.ints(whole // self.granule))
        return builder.shared("Min", count, builder.dim(self.leader, 2))

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
        return self.builder.op("Reshape", x, self._shape(rows, last))

    def _shape(self, rows: int = 0, last: int = 0) -> ir.Value:
        ints = self.builder.ints
        tail = (self._tokens(), ints(last)) if last else (ints(rows), self._tokens())
        return self.builder.shared("Concat", ints(0, 0, -1), *tail, axis=0)

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
        return builder.shared("Where", held, builder.floats(0.0), builder.floats(HIDDEN))

    def _over_blocks(self, x: ir.Value) -> ir.Value:
        return self.builder.op("ReduceSum", x, self.builder.ints(2), keepdims=0)


def _even_first(size: int) -> Any:
    """x times it has the even channels of x before the odd ones, exactly."""
    return np.concatenate([np.eye(size)[:, 0::2], np.eye(size)[:, 1::2]], axis=1)


def _query(size: int) -> Any:
    """What makes of a query what `a` and what `b` are multiplied by."""
    half = size // 2
    mixed = np.eye(size)
    mixed[half:, :half] = -np.eye(half) / _HALVES
    return _even_first(size) @ mixed / _HALVES


def _channels(size: int, blocks: int) -> Any:
    """1 for the channels of each block, [blocks, size]."""
    return np.kron(np.eye(blocks), np.ones((1, size // blocks)))


def _by_blocks(made: Any, blocks: int) -> Any:
    """What makes of a query what `made` does, once for each block of the channels that it takes."""
    return np.concatenate([made * own[:, None] for own in _channels(len(made), blocks)], axis=1)


def _values(size: int) -> Any:
    """What makes channels of the sums of `a` and of `b`."""
    half = size // 2
    mixed = np.eye(size) / _HALVES
    mixed[:half, half:] = -np.eye(half) / _HALVES**2
    return mixed @ _even_first(size).T
