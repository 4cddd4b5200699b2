"""Products by kernels in a graph of torch: one operator, which Inductor sees as opaque.

    y = einfold_triton.product(x, [codes, scales, ..], bias, "grouped(bits=4,..)", [N, M])

Pieces are in the order of kernels (`layout.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....ir.quant.scheme import Scheme, read_scheme
from ..device import interpreting
from ..dtypes import TYPES
from .kernels import LinearWeight, linear_kernel, product
from .kinds import LinearKind, type_of


@torch.library.custom_op("einfold_triton::product", mutates_args=())
def product_call(
    x: Tensor, pieces: Sequence[Tensor], bias: Tensor | None, scheme: str, shape: Sequence[int]
) -> Tensor:
    """x @ w.T + bias for the weight w, `shape` [N, M], that pieces in a scheme stand for."""
    kind = type_of(x.dtype)
    # The interpreter multiplies bfloat16 by its bits.
    widened = "fp32" if kind == "bf16" and interpreting() else ""
    of_bias = "" if bias is None else TYPES[bias.dtype]
    found = read_scheme(scheme)
    named = found.named(pieces, shape)
    weight = LinearWeight(named["packed"], named["scales"], named.get("zeros"))
    return product(
        linear_kernel(LinearKind(found, kind, of_bias, widened)), weight, x.contiguous(), bias
    )


@product_call.register_fake
def _(
    x: Tensor, pieces: Sequence[Tensor], bias: Tensor | None, scheme: str, shape: Sequence[int]
) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


def pieces_for_kernels(
    scheme: Scheme, shape: Sequence[int], pieces: Sequence[Tensor]
) -> list[Tensor]:
    """The pieces of a weight in the order of kernels."""
    layout = LinearKind(scheme, "fp32").layout(shape[-1])
    named = scheme.named(pieces, shape)
    return [layout.repacked(name, piece) for name, piece in named.items()]
