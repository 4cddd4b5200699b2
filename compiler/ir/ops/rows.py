"""Picking token rows out of a batch: the head of the model runs on the rows that are asked for."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("einfold::select_rows", mutates_args=())
def select_rows(x_BSM: Tensor, rows: Tensor) -> Tensor:
    """Rows of x flattened to [B*S, M]: gives [len(rows), M]; a row is b*S + s."""
    return x_BSM.flatten(0, 1).index_select(0, rows)


@select_rows.register_fake
def _(x_BSM: Tensor, rows: Tensor) -> Tensor:
    return x_BSM.new_empty((rows.shape[0], x_BSM.shape[2]))
