"""Linear layers and embeddings over plain weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from .record import OPERATORS, Operator


@OPERATORS.register
@dataclass(eq=False)
class Linear(Operator):
    """x @ weight.T + bias, for x of any rank."""

    name = "linear"
    by_rows = ("x",)

    x: Tensor
    weight_NM: Tensor
    bias: Tensor | None

    def run(self) -> Tensor:
        return functional.linear(self.x, self.weight_NM, self.bias)

    def shapes(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.weight_NM.shape[0]))


@OPERATORS.register
@dataclass(eq=False)
class Embedding(Operator):
    """Rows of the table; ids of any shape."""

    name = "embedding"

    ids: Tensor
    weight_VM: Tensor

    def run(self) -> Tensor:
        return functional.embedding(self.ids, self.weight_VM)

    def shapes(self) -> Tensor:
        return self.weight_VM.new_empty((*self.ids.shape, self.weight_VM.shape[1]))
