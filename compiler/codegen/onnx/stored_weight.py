"""A stored weight as lowerings see it: its pieces, and operators over them that are computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import fx

from .experts import expert_slice
from .lowerings import Context


@dataclass(frozen=True)
class Stored:
    """The pieces of a weight [rows, width], or of one expert of a stack, as ONNX values."""

    context: Context
    scheme: Any
    pieces: Mapping[str, fx.Node]
    rows: int
    width: int
    expert: int | None = None

    def piece(
        self, label: str, shape: tuple[int, ...] | None = None, dtype: ir.DataType | None = None
    ) -> ir.Value:
        """A piece, perhaps under another shape or type of as many bytes."""
        node = self.pieces[label]
        if self.expert is None or label in self.scheme.shared:
            name = self.context.weight_name(node)
            return self.context.builder.weight(name, shape=shape, dtype=dtype)
        return expert_slice(self.context, node, self.expert, shape, dtype)

    def size(self, label: str) -> int:
        """The last axis of a piece."""
        return int(self.pieces[label].meta["val"].shape[-1])

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """A node over weights alone: one for all that read the weight."""
        return self.context.builder.shared(kind, *inputs, **attributes)

    def looked_up(self, label: str, table: NDArray[Any]) -> ir.Value:
        """[rows, G, bytes * k]: for each byte of a piece the k numbers of `table` [256, k].

        Two bytes at a time where they come in pairs, since an index takes four bytes while it is computed.
        """
        shape = tuple(self.pieces[label].meta["val"].shape)[-3:]
        if self.expert is not None:
            shape = (self.rows, *shape[-2:])
        kind, count = ir.DataType.UINT8, shape[-1]
        if count % 2 == 0:
            kind, count = ir.DataType.UINT16, count // 2
            first, second = np.meshgrid(np.arange(256), np.arange(256))
            table = np.concatenate((table[first.ravel()], table[second.ravel()]), axis=-1)
        index = self.op(
            "Cast", self.piece(label, (*shape[:-1], count), kind), to=int(ir.DataType.INT32)
        )
        return self.gathered(table, index, (*shape[:-1], count * table.shape[-1]))

    def gathered(self, table: NDArray[Any], index: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Rows of a table by index, under a shape."""
        found = self.op("Gather", self.context.builder.constant(table, table.dtype), index, axis=0)
        return self.op("Reshape", found, self.context.builder.ints(*shape))


def bits_table(bits: int, codes: NDArray[np.int64], wide: int) -> NDArray[np.uint8]:
    """[256, k]: for each byte of codes of `bits` bits the bytes that hold, in `wide` bits, what `codes` makes
    of each."""
    byte = np.arange(256)
    found = codes[
        np.stack([byte >> place & (1 << bits) - 1 for place in range(0, 8, bits)], axis=-1)
    ]
    parts = found.reshape(256, -1, 8 // wide) << np.arange(0, 8, wide)
    table: NDArray[np.uint8] = parts.sum(-1).astype(np.uint8)
    return table
