"""Products by kernels in a graph of torch: one operator, which Inductor sees as opaque.

    y = einfold_triton.product(x, [codes, scales, ..], bias, "grouped(bits=4,..)", [N, M], "f32")

Pieces are in the order of kernels (`layout.py`), which is another one where activations are in "int8".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....ir.quant.scheme import Scheme, read_scheme
from ..device import interpreting
from ..dtypes import TYPES
from .kernels import LinearWeight, linear_kernel, product
from .kinds import INT8, LinearKind, type_of


@torch.library.custom_op("einfold_triton::product", mutates_args=())
def product_call(
    x: Tensor,
    pieces: Sequence[Tensor],
    bias: Tensor | None,
    scheme: str,
    shape: Sequence[int],
    activations: str = "f32",
) -> Tensor:
    """x @ w.T + bias for the weight w, `shape` [N, M], that pieces in a scheme stand for; with `activations`
    "int8", of x as `round_to_int8` has it."""
    kind = type_of(x.dtype)
    # The interpreter multiplies bfloat16 by its bits.
    widened = "fp32" if kind == "bf16" and interpreting() else ""
    multiplied = INT8 if activations == "int8" else widened
    of_bias = "" if bias is None else TYPES[bias.dtype]
    found = read_scheme(scheme)
    named = found.named(pieces, shape)
    kernel = linear_kernel(LinearKind(found, kind, of_bias, multiplied))
    return product(kernel, LinearWeight.of_pieces(named), x.contiguous(), bias)


@product_call.register_fake
def _(
    x: Tensor,
    pieces: Sequence[Tensor],
    bias: Tensor | None,
    scheme: str,
    shape: Sequence[int],
    activations: str = "f32",
) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


def pieces_for_kernels(
    scheme: Scheme, shape: Sequence[int], pieces: Sequence[Tensor], activations: str = "f32"
) -> list[Tensor]:
    """The pieces of a weight in the order of kernels."""
    product = INT8 if activations == "int8" else ""
    layout = LinearKind(scheme, "fp32", product=product).layout(shape[-1])
    named = scheme.named(pieces, shape)
    return [layout.repacked(name, piece) for name, piece in named.items()]
