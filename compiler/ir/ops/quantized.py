"""Operators that read quantized weights: groups of integers as they are (`quant/pack.py`), others widened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ....errors import IRError
from ..quant.pack import dequantize as dequantize_groups
from ..quant.scheme import read_scheme
from ..types import DTYPES
from .experts import Pick, Routed, part_of
from .record import OPERATORS, Operator

#: Weights that are widened at a time in a product: bounds its memory at some tens of megabytes.
_SLAB = 1 << 22


def meaning_of_pieces(pieces: Sequence[Tensor], scheme: str, shape: Sequence[int]) -> Tensor:
    """The weight of a shape that pieces in any scheme, given by its text, stand for, in float32."""
    kind = read_scheme(scheme)
    named = kind.named(pieces, shape)
    return kind.dequantize(named, shape[-1])


@OPERATORS.register
@dataclass(eq=False)
class Dequantize(Operator):
    """`meaning_of_pieces`."""

    name = "dequantize"

    pieces: Sequence[Tensor]
    scheme: str
    shape: Sequence[int]

    def run(self) -> Tensor:
        return meaning_of_pieces(self.pieces, self.scheme, self.shape)

    def shapes(self) -> Tensor:
        shape = tuple(self.shape)
        given = [(tuple(piece.shape), piece.dtype) for piece in self.pieces]
        wanted = read_scheme(self.scheme).pieces(shape).values()
        if given != [(size, DTYPES[kind]) for size, kind in wanted]:
            raise IRError(
                f"a weight {list(shape)} in the scheme {self.scheme} has other pieces than these"
            )
        return self.pieces[0].new_empty(shape, dtype=torch.float32)


@OPERATORS.register
@dataclass(eq=False)
class StoredLinear(Operator):
    """x @ w.T + bias for x [..., M] and the weight w, `shape` [N, M], that pieces in a scheme stand for."""

    name = "stored_linear"

    x: Tensor
    pieces: Sequence[Tensor]
    bias: Tensor | None
    scheme: str
    shape: Sequence[int]

    def run(self) -> Tensor:
        kind, (rows, width) = read_scheme(self.scheme), self.shape
        named = kind.named(self.pieces, self.shape)
        step = max(1, _SLAB // width)
        parts = []
        for start in range(0, rows, step):
            chosen = kind.chosen(named, slice(start, start + step))
            parts.append(functional.linear(self.x, kind.dequantize(chosen, width)))
        out = torch.cat(parts, dim=-1)
        return out if self.bias is None else out + self.bias

    def shapes(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.shape[0]))


@OPERATORS.register
@dataclass(eq=False)
class StoredEmbedding(Operator):
    """Rows `ids` of the table, of `shape` [V, M], that pieces in a scheme stand for."""

    name = "stored_embedding"

    ids: Tensor
    pieces: Sequence[Tensor]
    scheme: str
    shape: Sequence[int]

    def run(self) -> Tensor:
        kind = read_scheme(self.scheme)
        named = kind.named(self.pieces, self.shape)
        return kind.dequantize(kind.chosen(named, self.ids), self.shape[-1])

    def shapes(self) -> Tensor:
        return self.pieces[0].new_empty((*self.ids.shape, self.shape[-1]), dtype=torch.float32)


@OPERATORS.register
@dataclass(eq=False)
class QuantizedLinear(Operator):
    """x @ dequantized.T + bias, for x [..., M]."""

    name = "quantized_linear"

    x: Tensor
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    bits: int
    block: int

    def run(self) -> Tensor:
        width = self.x.shape[-1]
        step = max(1, _SLAB // width)
        parts = []
        for start in range(0, self.packed.shape[0], step):
            chosen = slice(start, start + step)
            zeros = None if self.zeros is None else self.zeros[chosen]
            weight = dequantize_groups(
                self.packed[chosen], self.scales[chosen], zeros, self.bits, self.block, width
            )
            parts.append(functional.linear(self.x, weight))
        out = torch.cat(parts, dim=-1)
        return out if self.bias is None else out + self.bias

    def shapes(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.packed.shape[0]))


@OPERATORS.register
@dataclass(eq=False)
class QuantizedEmbedding(Operator):
    """Rows `ids` of the dequantized table [V, width]."""

    name = "quantized_embedding"

    ids: Tensor
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    block: int
    width: int

    def run(self) -> Tensor:
        zeros = None if self.zeros is None else self.zeros[self.ids]
        return dequantize_groups(
            self.packed[self.ids], self.scales[self.ids], zeros, self.bits, self.block, self.width
        )

    def shapes(self) -> Tensor:
        return self.scales.new_empty((*self.ids.shape, self.width))


@OPERATORS.register
@dataclass(eq=False)
class QuantizedExperts(Routed):
    """`Experts` over packed weights: a leading axis E on every weight."""

    name = "quantized_experts"

    x_TM: Tensor
    index_TJ: Tensor
    weight_TJ: Tensor
    gate_up_packed: Tensor
    gate_up_scales: Tensor
    gate_up_zeros: Tensor | None
    gate_up_bias: Tensor | None
    down_packed: Tensor
    down_scales: Tensor
    down_zeros: Tensor | None
    down_bias: Tensor | None
    kind: str
    alpha: float
    limit: float
    bits: int
    block: int

    @property
    def sizes(self) -> tuple[int, int]:
        return self.gate_up_packed.shape[0], self.gate_up_packed.shape[1]

    def gate_up(self, of: Pick) -> tuple[Tensor, Tensor | None]:
        pieces = (self.gate_up_packed, self.gate_up_scales, self.gate_up_zeros)
        weight = self._weight(of, *pieces, self.x_TM.shape[1])
        return weight, part_of(of, self.gate_up_bias)

    def down(self, of: Pick) -> tuple[Tensor, Tensor | None]:
        pieces = (self.down_packed, self.down_scales, self.down_zeros)
        weight = self._weight(of, *pieces, self.gate_up_packed.shape[1] // 2)
        return weight, part_of(of, self.down_bias)

    def _weight(
        self, of: Pick, packed: Tensor, scales: Tensor, zeros: Tensor | None, width: int
    ) -> Tensor:
        of_expert = (of(packed), of(scales), part_of(of, zeros))
        return dequantize_groups(*of_expert, self.bits, self.block, width)


@OPERATORS.register
@dataclass(eq=False)
class StoredExperts(Routed):
    """`Experts` over pieces in a scheme, stacked along a leading axis E: only experts that a token chose are
    widened, one at a time.

    `gate_up_shape` is [E, N, M] and `down_shape` [E, M, I].
    """

    name = "stored_experts"

    x_TM: Tensor
    index_TJ: Tensor
    weight_TJ: Tensor
    gate_up_pieces: Sequence[Tensor]
    gate_up_bias: Tensor | None
    down_pieces: Sequence[Tensor]
    down_bias: Tensor | None
    kind: str
    alpha: float
    limit: float
    scheme: str
    gate_up_shape: Sequence[int]
    down_shape: Sequence[int]

    @property
    def sizes(self) -> tuple[int, int]:
        return self.gate_up_shape[0], self.gate_up_shape[1]

    def gate_up(self, of: Pick) -> tuple[Tensor, Tensor | None]:
        weight = self._weight(of, self.gate_up_pieces, self.gate_up_shape)
        return weight, part_of(of, self.gate_up_bias)

    def down(self, of: Pick) -> tuple[Tensor, Tensor | None]:
        return self._weight(of, self.down_pieces, self.down_shape), part_of(of, self.down_bias)

    def _weight(self, of: Pick, pieces: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        kind = read_scheme(self.scheme)
        return kind.dequantize(kind.of_one(kind.named(pieces, shape), of), shape[-1])
