"""Linear layers and embeddings over plain weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


@torch.library.custom_op("einfold::linear", mutates_args=())
def linear(x: Tensor, weight_NM: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, for x of any rank."""
    return functional.linear(x, weight_NM, bias)


@linear.register_fake
def _(x: Tensor, weight_NM: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_NM.shape[0]))


@torch.library.custom_op("einfold::embedding", mutates_args=())
def embedding(ids: Tensor, weight_VM: Tensor) -> Tensor:
    """Rows of the table; ids of any shape."""
    return functional.embedding(ids, weight_VM)


@embedding.register_fake
def _(ids: Tensor, weight_VM: Tensor) -> Tensor:
    return weight_VM.new_empty((*ids.shape, weight_VM.shape[1]))
