"""Blocks of rows, each with the keys that its rows may see: what a mask hides of all keys is not computed.

rows 0..127     keys 0..127         causal, 512 rows in 4 blocks: 10 of 16 products
rows 128..255   keys 0..255
..
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from .builder import Builder

#: Below so many rows a block takes as long to start as it saves.
FEWEST = 128
#: Rows of a block, at least, and blocks, at most; and blocks where the number of rows varies.
_ROWS, _BLOCKS, _VARYING = 64, 8, 4
#: The part of all products that blocks may leave, at most, to be worth their place.
_WORTH = 0.8

Size = int | ir.Value


@dataclass(frozen=True)
class Block:
    """Rows from `first` to before `last`, keys from `start` to before `end`."""

    builder: Builder
    first: Size
    last: Size
    start: Size
    end: Size

    def rows(self, x: ir.Value, axis: int) -> ir.Value:
        """These rows of a tensor."""
        return self._cut(x, self.first, self.last, axis)

    def keys(self, x: ir.Value, axis: int) -> ir.Value:
        """These keys of a tensor."""
        return self._cut(x, self.start, self.end, axis)

    def _cut(self, x: ir.Value, start: Size, end: Size, axis: int) -> ir.Value:
        builder = self.builder
        return builder.op(
            "Slice", x, *(_value(builder, at) for at in (start, end)), builder.ints(axis)
        )

    def later(self, hidden: float) -> ir.Value:
        """[rows, keys]: a number at keys behind a row's own place, else 0."""
        builder = self.builder
        sizes = [_less(builder, self.last, self.first), _less(builder, self.end, self.start)]
        shape = builder.op("Concat", *(_value(builder, size) for size in sizes), axis=0)
        filled = builder.op(
            "ConstantOfShape", shape, value=ir.tensor([hidden], dtype=ir.DataType.FLOAT)
        )
        diagonal = _less(builder, self.first, self.start, 1)
        place = builder.op("Squeeze", _value(builder, diagonal))
        return builder.op("Trilu", filled, place, upper=1)


def of_known(
    builder: Builder, rows: int, keys: int, behind: int | None, ahead: int | None
) -> list[Block]:
    """Blocks of so many rows over so many keys; none where they save too little, or leave a key to nobody.

    A value of NaN reaches every row where attention is spelled out, so one block at least has to meet it.
    """
    count = min(_BLOCKS, rows // _ROWS)
    found, products, met = [], 0, 0
    for at in range(count):
        first, last = rows * at // count, rows * (at + 1) // count
        start = 0 if behind is None else max(first - behind, 0)
        end = keys if ahead is None else min(last + ahead, keys)
        if start >= end or start > met:
            return []
        met = end
        products += (last - first) * (end - start)
        found.append(Block(builder, first, last, start, end))
    worth = rows >= FEWEST and products <= _WORTH * rows * keys
    return found if worth and met == keys else []


def of_varying(
    builder: Builder, rows: ir.Value, behind: int | None, ahead: int | None
) -> list[Block]:
    """Blocks of rows whose number, int64 of shape [1], is known at run time, over as many keys."""
    number = builder.ints(_VARYING)
    bounds: list[Size] = [
        builder.op("Div", builder.op("Mul", rows, builder.ints(at)), number) if at else 0
        for at in range(_VARYING + 1)
    ]
    found = []
    for first, last in pairwise(bounds):
        start: Size = 0
        if behind is not None and not isinstance(first, int):
            start = builder.op(
                "Max", builder.op("Sub", first, builder.ints(behind)), builder.ints(0)
            )
        end: Size = rows if ahead is None else last
        if ahead:
            end = builder.op("Add", _value(builder, last), builder.ints(ahead))
            end = builder.op("Min", end, rows)
        found.append(Block(builder, first, last, start, end))
    return found


def _value(builder: Builder, size: Size) -> ir.Value:
    return builder.ints(size) if isinstance(size, int) else size


def _less(builder: Builder, size: Size, other: Size, more: int = 0) -> Size:
    """size - other + more"""
    if isinstance(size, int) and isinstance(other, int):
        return size - other + more
    if other == 0:
        found = _value(builder, size)
    else:
        found = builder.op("Sub", _value(builder, size), _value(builder, other))
    return builder.op("Add", found, builder.ints(more)) if more else found
