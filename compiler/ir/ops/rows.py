"""Picking token rows out of a batch: the head of the model runs on the rows that are asked for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .record import OPERATORS, Operator


@OPERATORS.register
@dataclass(eq=False)
class SelectRows(Operator):
    """Rows of x flattened to [B*S, M]: gives [len(rows), M]; a row is b*S + s."""

    name = "select_rows"

    x_BSM: Tensor
    rows: Tensor

    def run(self) -> Tensor:
        return self.x_BSM.flatten(0, 1).index_select(0, self.rows)

    def shapes(self) -> Tensor:
        return self.x_BSM.new_empty((self.rows.shape[0], self.x_BSM.shape[2]))
