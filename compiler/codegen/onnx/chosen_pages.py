"""Which pages of a cache a step of one new token reads: what layers that go by one counter have in common."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...ir.kv.read.pages.paged import Paged
from .builder import Builder
from .one_token import HIDDEN


@dataclass(frozen=True)
class Pages:
    """What layers that go by one counter share of a step; each part is made once, whatever the layers."""

    builder: Builder
    reader: Paged
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
        """Pages that the newest token of each row reads, as `Paged.pages` counts them."""
        builder, reader = self.builder, self.reader
        double = int(ir.DataType.DOUBLE)

        def number(value: float) -> ir.Value:
            return builder.constant(value, np.float64)

        wanted = builder.shared("Cast", self.total_B, to=double)
        wanted = builder.shared("Mul", wanted, number(reader.share))
        wanted = builder.shared("Max", wanted, number(reader.tokens))
        wanted = builder.shared("Ceil", builder.shared("Div", wanted, number(reader.page)))
        count = self._int(
            "Max", builder.shared("Cast", wanted, to=int(ir.DataType.INT64)), reader.always
        )
        if reader.apart:
            count = self._int("Add", count, reader.apart)
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

    def others(self) -> ir.Value:
        """What keeps the pages that are always read from being chosen once more, [B, 1, P]."""
        builder, index = self.builder, self._index()
        others = self._int("Greater", index, 0)
        before = self._int("Sub", self._newest(), self.reader.always - 2)
        others = builder.shared("And", others, builder.shared("Less", index, before))
        others = builder.shared("Where", others, builder.floats(0.0), builder.floats(2 * HIDDEN))
        return builder.shared("Unsqueeze", others, builder.ints(1))

    def apart(self, bounds_BKPE: ir.Value) -> ir.Value:
        """The pages whose keys are most apart, the last number of a statistic, beside those that are always
        read, [B, K, R]. Where a row has fewer they come first."""
        builder = self.builder
        far = builder.op("Gather", bounds_BKPE, builder.constant(-1, np.int64), axis=3)
        far = builder.op("Add", builder.op("Cast", far, to=int(ir.DataType.FLOAT)), self.others())
        return builder.multi("TopK", 2, far, builder.ints(self.reader.apart), axis=2)[1]

    def best(self, score_BKP: ir.Value) -> ir.Value:
        """The best pages, beside those that are read whatever their score, [B, K, T - A - R]."""
        builder, reader = self.builder, self.reader
        more = self._int("Sub", self.chosen(), reader.always + reader.apart)

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
