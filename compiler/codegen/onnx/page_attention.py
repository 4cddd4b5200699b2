"""One new token's attention over the pages of a cache that Quest chooses, and the bounds it goes by.

    bounds = max | min of the keys of the page that the token comes into
    pages  = top(max over a group's heads of softmax((q + |q| spread) / 2 . max + (q - |q| spread) / 2 . min))
    out    = softmax(q . K[pages]) . V[pages]

Bounds lie side by side as the query's two parts do, so scores are one product. Slots come in whole pages, so
that a page is a row of a view and is gathered at once. MatMul, Softmax, MatMul over what was chosen took two
thirds of what a GroupQueryAttention over it did.

Of an int8 cache nothing is widened, neither the bounds, which are int8 too, nor what was chosen: all three
products are of integers, in planes as in `integer_attention`. That took 0.55 to 0.6 of the time behind 16,384
tokens and 0.75 behind 4,096 (heads of 64, seven for a KV head). Probabilities are in one block here, so they
have a third plane: what 2,000 slots have beside a probability of 0.9 must not be lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...ir.kv.read.quest.reader import Quest
from .builder import CONTRIB, Builder
from .float_attention import softmax_beside
from .integer_attention import LEVELS, products_of, query_columns, weight_planes
from .one_token import HIDDEN, capped

#: Of the probabilities of what was chosen of an int8 cache.
_PLANES = 3


@dataclass(frozen=True)
class Pages:
    """What layers that go by one counter share of a step; each part is made once, whatever the layers."""

    builder: Builder
    reader: Quest
    kv_heads: int
    used_B: ir.Value
    new: ir.Value
    """The new tokens, [1]."""
    total_B: ir.Value
    """The tokens of each row, with them."""
    pages: ir.Value
    """Pages that there are bounds of, [1]."""

    def _int(self, kind: str, a: ir.Value, b: int) -> ir.Value:
        return self.builder.shared(kind, a, self.builder.ints(b))

    def _range(self, end: ir.Value) -> ir.Value:
        zero, one = (self.builder.constant(value, np.int64) for value in (0, 1))
        return self.builder.shared("Range", zero, self.builder.shared("Squeeze", end), one)

    def _seen(self) -> ir.Value:
        """Pages in use."""
        return self._int(
            "Div", self._int("Add", self.total_B, self.reader.page - 1), self.reader.page
        )

    def _count(self) -> ir.Value:
        """Pages that the newest token of each row reads, as `Quest.pages` counts them."""
        builder, reader = self.builder, self.reader
        double = int(ir.DataType.DOUBLE)

        def number(value: float) -> ir.Value:
            return builder.constant(value, np.float64)

        wanted = builder.shared("Cast", self.total_B, to=double)
        wanted = builder.shared("Mul", wanted, number(reader.share))
        wanted = builder.shared("Max", wanted, number(reader.tokens))
        wanted = builder.shared("Ceil", builder.shared("Div", wanted, number(reader.page)))
        count = self._int(
            "Max", builder.shared("Cast", wanted, to=int(ir.DataType.INT64)), self.reader.always
        )
        return builder.shared("Min", count, self._seen())

    def _most(self, counts_B: ir.Value) -> ir.Value:
        most = self.builder.shared("ReduceMax", counts_B, keepdims=0)
        return self.builder.shared("Reshape", most, self.builder.ints(1))

    def chosen(self) -> ir.Value:
        """How many pages are chosen for the row that reads most, [1]."""
        return self._most(self._count())

    def wanted(self) -> ir.Value:
        """Whether a step reads less than everything, [1]: one token, and more pages than are chosen."""
        one = self._int("Equal", self.new, 1)
        fewer = self.builder.shared("Less", self.chosen(), self._most(self._seen()))
        return self.builder.shared("And", one, fewer)

    def used(self) -> ir.Value:
        """What hides pages that no token has come into yet from a softmax over pages, [B, 1, 1, P]."""
        unused = self.builder.shared("Greater", self._index(), self._newest())
        hidden = self.builder.shared(
            "Where", unused, self.builder.floats(HIDDEN), self.builder.floats(0.0)
        )
        return self.builder.shared("Unsqueeze", hidden, self.builder.ints(1, 2))

    def always(self) -> ir.Value:
        """The pages that are always read, the newest before all, [B, K, A]."""
        builder, most = self.builder, self.reader.always
        back = builder.constant(np.arange(most - 1), np.int64)
        newest = builder.shared("Sub", self._newest(), back)
        first = self._int("Mul", self._newest(), 0)  # a zero for each row
        # Where a row has fewer pages some stand twice: what it does not read is hidden.
        listed = builder.shared("Concat", newest, first, axis=1)
        listed = builder.shared("Unsqueeze", self._int("Max", listed, 0), builder.ints(1))
        return builder.shared("Expand", listed, builder.ints(1, self.kv_heads, 1))

    def apart(self) -> ir.Value:
        """What keeps the pages that are always read from being chosen once more, [B, 1, P]."""
        builder, index = self.builder, self._index()
        others = self._int("Greater", index, 0)
        before = self._int("Sub", self._newest(), self.reader.always - 2)
        others = builder.shared("And", others, builder.shared("Less", index, before))
        apart = builder.shared("Where", others, builder.floats(0.0), builder.floats(2 * HIDDEN))
        return builder.shared("Unsqueeze", apart, builder.ints(1))

    def best(self, score_BKP: ir.Value) -> ir.Value:
        """The best pages, beside those that are always read, [B, K, T - A]."""
        builder = self.builder
        more = self._int("Sub", self.chosen(), self.reader.always)

        def of(ordered: bool) -> list[ir.Value]:
            return [builder.multi("TopK", 2, score_BKP, more, axis=2, sorted=int(ordered))[1]]

        # In order only where rows read different numbers of them: sorting takes a third of TopK's time.
        least = builder.shared("ReduceMin", self._count(), keepdims=0)
        even = builder.shared(
            "Equal", builder.shared("Reshape", least, builder.ints(1)), self.chosen()
        )
        return builder.choose(even, lambda: of(False), lambda: of(True))[0]

    def _index(self) -> ir.Value:
        return self._range(self.pages)

    def _newest(self) -> ir.Value:
        newest = self._int("Sub", self._seen(), 1)
        return self.builder.shared("Unsqueeze", newest, self.builder.ints(1))

    def shown(self) -> ir.Value:
        """What hides slots of the chosen pages that hold no token yet, which only the newest may have, and
        pages beyond those that a row reads, [B, 1, 1, N]. The newest is the first of the chosen."""
        builder, page = self.builder, self.reader.page
        rank = builder.shared("Unsqueeze", self._range(self.chosen()), builder.ints(1))
        count = builder.shared("Unsqueeze", self._count(), builder.ints(1, 2))
        inside = builder.constant(np.arange(page), np.int64)
        last = self._int("Mod", self._int("Sub", self.total_B, 1), page)
        last = builder.shared("Unsqueeze", last, builder.ints(1, 2))
        held = builder.shared("LessOrEqual", inside, last)
        held = builder.shared("Or", held, self._int("Greater", rank, 0))
        held = builder.shared("And", held, builder.shared("Less", rank, count))
        hidden = builder.shared("Where", held, builder.floats(0.0), builder.floats(HIDDEN))
        return builder.shared("Reshape", hidden, builder.ints(0, 1, 1, -1))

    def first(self) -> ir.Value:
        """The page that the first new token comes into."""
        return self._int("Div", self.used_B, self.reader.page)

    def touched(self) -> ir.Value:
        """The slots of the pages that new tokens may come into, [B, K, N, 1]; for those behind the newest
        that one."""
        builder, page = self.builder, self.reader.page
        count = self._int("Div", self._int("Add", self.new, page - 2), page)
        slots = self._range(self._int("Mul", self._int("Add", count, 1), page))
        start = builder.shared("Unsqueeze", self._int("Mul", self.first(), page), builder.ints(1))
        last = builder.shared("Unsqueeze", self._int("Sub", self.total_B, 1), builder.ints(1))
        index = builder.shared("Min", builder.shared("Add", start, slots), last)
        index = builder.shared("Unsqueeze", index, builder.ints(1, 3))
        heads = builder.ints(1, self.kv_heads, 1, 1)
        return builder.shared("Expand", index, heads)


@dataclass(frozen=True)
class _Asked:
    """A query as it is multiplied with rows: [B, K, G, D], or over int8 the columns of its planes and what
    adds up their products."""

    builder: Builder
    query: ir.Value
    join: ir.Value | None = None

    def with_rows(self, stored_BKND: ir.Value) -> ir.Value:
        """The products [B, K, G, N]."""
        query, rows = self.query, stored_BKND
        if self.join is not None:
            query, rows = self.join, products_of(self.builder, self.query, stored_BKND)
        return self.builder.op("FusedMatMul", query, rows, domain=CONTRIB, transB=1)


@dataclass(frozen=True)
class PageAttention:
    """One layer's; scales are those of an int8 cache, or None."""

    pages: Pages
    heads: int
    key_size: int
    value_size: int
    scale: float
    softcap: float
    sinks_H: ir.Value | None = None
    key_scale_KD: ir.Value | None = None
    value_scale_KD: ir.Value | None = None

    @property
    def builder(self) -> Builder:
        return self.pages.builder

    @property
    def kv_heads(self) -> int:
        return self.pages.kv_heads

    def refreshed(self, bounds_BKPE: ir.Value, keys_BKCD: ir.Value) -> ir.Value:
        """The bounds, with those of the pages that the new tokens came into found anew."""
        builder = self.builder
        taken = builder.op("GatherND", keys_BKCD, self.pages.touched(), batch_dims=2)
        paged = builder.reshape(taken, [0, 0, -1, self.pages.reader.page, self.key_size])
        largest, smallest = (
            builder.op(kind, paged, builder.ints(3), keepdims=0)
            for kind in ("ReduceMax", "ReduceMin")
        )
        both = builder.op("Concat", largest, smallest, axis=3)
        return builder.op("TensorScatter", bounds_BKPE, both, self.pages.first(), axis=2)

    def __call__(
        self, query_B1M: ir.Value, keys: ir.Value, values: ir.Value, bounds: ir.Value
    ) -> ir.Value:
        """Turned queries, and both caches and bounds with the new token; gives [B, 1, heads * value size]."""
        builder, group = self.builder, self.heads // self.kv_heads
        query = builder.reshape(query_B1M, [0, self.kv_heads, group, self.key_size])
        by_bounds, by_keys = self._asked(builder.op("Mul", query, self._query_factor()))
        pages = self._chosen(by_bounds.with_rows(bounds))
        logits = by_keys.with_rows(self._taken(keys, pages, self.key_size))
        logits = builder.op("Add", capped(builder, logits, self.softcap), self.pages.shown())
        taken = self._taken(values, pages, self.value_size)
        if self.value_scale_KD is None:
            weights = softmax_beside(builder, logits, self._sinks())
            out = builder.op("MatMul", weights, taken)
        else:
            out = self._weighted(logits, taken)
            out = builder.op("Mul", out, self._by_head(self.value_scale_KD, self.value_size))
        return builder.reshape(out, [0, 1, self.heads * self.value_size])

    def _query_factor(self) -> ir.Value:
        """The softmax's scale, times the keys' scales."""
        factor = self.builder.floats(self.scale)
        if self.key_scale_KD is None:
            return factor
        by_head = self._by_head(self.key_scale_KD, self.key_size)
        return self.builder.shared("Mul", by_head, factor)

    def _by_head(self, scale_KD: ir.Value, size: int) -> ir.Value:
        return self.builder.shared("Reshape", scale_KD, self.builder.ints(self.kv_heads, 1, size))

    def _asked(self, query_BKGD: ir.Value) -> tuple[_Asked, _Asked]:
        """What is multiplied with bounds of pages, and with keys."""
        builder, size = self.builder, self.key_size
        # Of both ways from the middle to a bound the one that a number's sign asks for is the larger.
        ways = [
            builder.op("Mul", query_BKGD, builder.floats((1 + way * self.pages.reader.spread) / 2))
            for way in (1, -1)
        ]
        parts = [builder.op(kind, *ways) for kind in ("Max", "Min")]
        if self.key_scale_KD is None:
            both = builder.op("Concat", *parts, axis=3)
            return _Asked(builder, both), _Asked(builder, query_BKGD)
        # All in one pair of planes, so that there are half as many operators.
        together = builder.op("Concat", *parts, query_BKGD, axis=3)
        columns, join = query_columns(builder, together, self.heads // self.kv_heads)
        by_bounds, by_keys = builder.split(columns, [2 * size, size], axis=2)
        return _Asked(builder, by_bounds, join), _Asked(builder, by_keys, join)

    def _chosen(self, upper_BKGP: ir.Value) -> ir.Value:
        """The chosen pages, [B, K, T, 1]."""
        builder, pages = self.builder, self.pages
        upper_BKGP = builder.op("Add", upper_BKGP, pages.used())
        share_BKGP = builder.op("LogSoftmax", upper_BKGP, axis=3)
        score_BKP = builder.op("ReduceMax", share_BKGP, builder.ints(2), keepdims=0)
        best_BKT = pages.best(builder.op("Add", score_BKP, pages.apart()))
        chosen_BKT = builder.op("Concat", pages.always(), best_BKT, axis=2)
        return builder.op("Unsqueeze", chosen_BKT, builder.ints(3))

    def _taken(self, cache_BKCD: ir.Value, pages: ir.Value, size: int) -> ir.Value:
        """What the slots of some pages hold, [B, K, N, D]."""
        builder = self.builder
        paged = builder.reshape(cache_BKCD, [0, 0, -1, self.pages.reader.page * size])
        taken = builder.op("GatherND", paged, pages, batch_dims=2)
        return builder.reshape(taken, [0, 0, -1, size])

    def _sinks(self) -> ir.Value | None:
        if self.sinks_H is None:
            return None
        return self.builder.reshape(
            self.sinks_H, [1, self.kv_heads, self.heads // self.kv_heads, 1]
        )

    def _weighted(self, logits_BKGN: ir.Value, values_BKND: ir.Value) -> ir.Value:
        """The weighted mean of int8 values, [B, K, G, D]."""
        builder, group = self.builder, self.heads // self.kv_heads
        top = builder.op("ReduceMax", logits_BKGN, builder.ints(3), keepdims=1)
        sinks = self._sinks()
        if sinks is not None:
            top = builder.op("Max", top, sinks)
        shift = builder.op("Sub", top, builder.floats(float(np.log(LEVELS))))
        weights = builder.op("Exp", builder.op("Sub", logits_BKGN, shift))
        total = builder.op("ReduceSum", weights, builder.ints(3), keepdims=1)
        if sinks is not None:
            total = builder.op("Add", total, builder.op("Exp", builder.op("Sub", sinks, shift)))
        planes, one = weight_planes(builder, weights, _PLANES), builder.floats(1.0)
        sums = builder.op("MatMulIntegerToFloat", planes, values_BKND, one, one, domain=CONTRIB)
        each = np.concatenate([np.eye(group) / LEVELS**plane for plane in range(_PLANES)], axis=1)
        out = builder.op("MatMul", builder.constant(each, np.float32), sums)
        return builder.op("Div", out, total)
