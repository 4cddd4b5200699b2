"""Mixing the channels of rows by two small matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .record import OPERATORS, Operator


@OPERATORS.register
@dataclass(eq=False)
class MixChannels(Operator):
    """Each row of x [.., ab] is X [a, b], and becomes outer X inner, of matrices [a, a] and [b, b]."""

    name = "mix_channels"

    x: Tensor
    outer: Tensor
    inner: Tensor

    def run(self) -> Tensor:
        sets = self.x.unflatten(-1, (len(self.outer), -1))
        found: Tensor = (self.outer @ sets @ self.inner).flatten(-2)
        return found

    def shapes(self) -> Tensor:
        (rows, columns), (first, last) = self.outer.shape, self.inner.shape
        if rows != columns or first != last or rows * first != self.x.shape[-1]:
            raise ValueError(
                f"matrices {[rows, columns]} and {[first, last]} mix no rows of {self.x.shape[-1]} channels"
            )
        return self.x.new_empty(self.x.shape)
