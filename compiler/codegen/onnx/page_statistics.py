"""Statistics of pages of keys in ONNX: what `statistic.py` of each reader of pages says in torch.

of_pages   the statistic [B, K, P, E] of whole pages [B, K, P, N, D], in the keys' type
asked      what of a query [B, K, G, D] it is multiplied with [B, K, G, E]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ...ir.kv.read.pages.paged import Paged
from ...ir.kv.read.quest.reader import Quest
from ...ir.kv.read.shadowkv.numbers import FARTHEST, TINY
from ...ir.kv.read.shadowkv.reader import ShadowKV
from .builder import Builder


@dataclass(frozen=True)
class PageStatistic(ABC):
    """One reader's. Keys are `codes` of int8, or float32."""

    builder: Builder
    reader: Any
    codes: bool

    @abstractmethod
    def of_pages(self, keys_BKPND: ir.Value) -> ir.Value: ...

    @abstractmethod
    def asked(self, query_BKGD: ir.Value) -> ir.Value: ...

    def in_type_of_keys(self, found: ir.Value) -> ir.Value:
        """A statistic in float32 as it is stored, rounded where keys are codes."""
        if not self.codes:
            return found
        builder = self.builder
        rounded = builder.op("Floor", builder.op("Add", found, builder.floats(0.5)))
        return builder.op("Cast", rounded, to=int(ir.DataType.INT8))


class Bounds(PageStatistic):
    """The largest numbers, then the smallest."""

    reader: Quest

    def of_pages(self, keys_BKPND: ir.Value) -> ir.Value:
        builder = self.builder
        largest, smallest = (
            builder.op(kind, keys_BKPND, builder.ints(3), keepdims=0)
            for kind in ("ReduceMax", "ReduceMin")
        )
        return builder.op("Concat", largest, smallest, axis=3)

    def asked(self, query_BKGD: ir.Value) -> ir.Value:
        builder = self.builder
        # Of both ways from the middle to a bound the one that a number's sign asks for is the larger.
        ways = [
            builder.op("Mul", query_BKGD, builder.floats((1 + way * self.reader.spread) / 2))
            for way in (1, -1)
        ]
        parts = [builder.op(kind, *ways) for kind in ("Max", "Min")]
        return builder.op("Concat", *parts, axis=3)


class Between(PageStatistic):
    """One number between the largest and the smallest."""

    reader: Quest

    def of_pages(self, keys_BKPND: ir.Value) -> ir.Value:
        builder, parts = self.builder, []
        shares = {"ReduceMax": self.reader.linear, "ReduceMin": 1 - self.reader.linear}
        for kind, share in shares.items():
            found = builder.op(kind, keys_BKPND, builder.ints(3), keepdims=0)
            found = builder.op("Cast", found, to=int(ir.DataType.FLOAT))
            parts.append(builder.op("Mul", found, builder.floats(share)))
        return self.in_type_of_keys(builder.op("Add", *parts))

    def asked(self, query_BKGD: ir.Value) -> ir.Value:
        return query_BKGD


class Landmarks(PageStatistic):
    """The mean, then how far its keys are apart."""

    reader: ShadowKV

    def of_pages(self, keys_BKPND: ir.Value) -> ir.Value:
        builder, page = self.builder, self.reader.page
        # Of float32 too, where nothing comes of it: so a reader of the model sees what is divided.
        keys_BKPND = builder.op("Cast", keys_BKPND, to=int(ir.DataType.FLOAT))
        mean_BKPD = builder.op("ReduceMean", keys_BKPND, builder.ints(3), keepdims=0)
        squares = builder.op("ReduceSumSquare", keys_BKPND, builder.ints(3, 4), keepdims=0)
        length = builder.op("Div", squares, builder.floats(float(page)))
        length = builder.op("Max", length, builder.floats(TINY))
        alike = builder.op("ReduceSumSquare", mean_BKPD, builder.ints(3), keepdims=0)
        apart = builder.op("Sub", builder.floats(1.0), builder.op("Div", alike, length))
        apart = builder.op("Mul", apart, builder.floats(FARTHEST))
        apart = builder.op("Unsqueeze", apart, builder.ints(3))
        return self.in_type_of_keys(builder.op("Concat", mean_BKPD, apart, axis=3))

    def asked(self, query_BKGD: ir.Value) -> ir.Value:
        return self.builder.op("Pad", query_BKGD, self.builder.ints(0, 0, 0, 0, 0, 0, 0, 1))


_OF: dict[type[Paged], type[PageStatistic]] = {Quest: Bounds, ShadowKV: Landmarks}


def page_statistic(builder: Builder, reader: Paged, codes: bool) -> PageStatistic:
    """That of a reader."""
    kind = Between if isinstance(reader, Quest) and reader.linear else _OF[type(reader)]
    return kind(builder, reader, codes)
