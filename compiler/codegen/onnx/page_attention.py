"""One new token's attention over the pages of a cache that a reader chooses, and the statistics it goes by.

    bounds = statistic of the keys of the page that the token comes into
    pages  = top(max over a group's heads of softmax(parts of q . bounds)), and those most apart
    out    = softmax(q . K[pages]) . V[pages]

Numbers of a statistic lie side by side as the query's parts do, so scores are one product. Slots come in
whole pages, so that a page is a row of a view and is gathered at once. MatMul, Softmax, MatMul over what was
chosen took two thirds of what a GroupQueryAttention over it did.

Of an int8 cache nothing is widened, neither the bounds, which are int8 too, nor what was chosen: all three
products are of integers, in planes as in `integer_attention`. That took 0.55 to 0.6 of the time behind 16,384
tokens and 0.75 behind 4,096 (heads of 64, seven for a KV head). Probabilities are in one block here, so they
have a third plane: what 2,000 slots have beside a probability of 0.9 must not be lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .builder import CONTRIB, Builder
from .chosen_pages import Pages
from .float_attention import softmax_beside
from .integer_attention import LEVELS, products_of, query_columns, weight_planes
from .one_token import HIDDEN, capped
from .page_statistics import PageStatistic, page_statistic

#: Of the probabilities of what was chosen of an int8 cache.
_PLANES = 3


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

    @property
    def statistic(self) -> PageStatistic:
        return page_statistic(self.builder, self.pages.reader, self.key_scale_KD is not None)

    def refreshed(self, bounds_BKPE: ir.Value, keys_BKCD: ir.Value) -> ir.Value:
        """The statistics, with those of the pages that the new tokens came into found anew."""
        builder = self.builder
        taken = builder.op("GatherND", keys_BKCD, self.pages.touched(), batch_dims=2)
        paged = builder.reshape(taken, [0, 0, -1, self.pages.reader.page, self.key_size])
        found = self.statistic.of_pages(paged)
        return builder.op("TensorScatter", bounds_BKPE, found, self.pages.first(), axis=2)

    def __call__(
        self, query_B1M: ir.Value, keys: ir.Value, values: ir.Value, bounds: ir.Value
    ) -> ir.Value:
        """Turned queries, and both caches and bounds with the new token; gives [B, 1, heads * value size]."""
        builder, group = self.builder, self.heads // self.kv_heads
        query = builder.reshape(query_B1M, [0, self.kv_heads, group, self.key_size])
        by_bounds, by_keys = self._asked(builder.op("Mul", query, self._query_factor()))
        pages = self._chosen(by_bounds.with_rows(bounds), bounds)
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
        """What is multiplied with statistics of pages, and with keys."""
        builder, size = self.builder, self.key_size
        asked = self.statistic.asked(query_BKGD)
        if self.key_scale_KD is None:
            return _Asked(builder, asked), _Asked(builder, query_BKGD)
        if asked is query_BKGD:  # what is multiplied with both
            both = _Asked(builder, *query_columns(builder, asked, self.heads // self.kv_heads))
            return both, both
        # All in one pair of planes, so that there are half as many operators.
        together = builder.op("Concat", asked, query_BKGD, axis=3)
        columns, join = query_columns(builder, together, self.heads // self.kv_heads)
        sizes = [self.pages.reader.bound_numbers(size), size]
        by_bounds, by_keys = builder.split(columns, sizes, axis=2)
        return _Asked(builder, by_bounds, join), _Asked(builder, by_keys, join)

    def _chosen(self, upper_BKGP: ir.Value, bounds_BKPE: ir.Value) -> ir.Value:
        """The chosen pages, [B, K, T, 1]."""
        builder, pages = self.builder, self.pages
        upper_BKGP = builder.op("Add", upper_BKGP, pages.used())
        share_BKGP = builder.op("LogSoftmax", upper_BKGP, axis=3)
        score_BKP = builder.op("ReduceMax", share_BKGP, builder.ints(2), keepdims=0)
        score_BKP = builder.op("Add", score_BKP, pages.others())
        parts = [pages.always()]
        if pages.reader.apart:
            far_BKR = pages.apart(bounds_BKPE)
            taken = builder.op("Expand", builder.floats(2 * HIDDEN), builder.op("Shape", far_BKR))
            score_BKP = builder.op("ScatterElements", score_BKP, far_BKR, taken, axis=2)
            parts.append(far_BKR)
        chosen_BKT = builder.op("Concat", *parts, pages.best(score_BKP), axis=2)
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
