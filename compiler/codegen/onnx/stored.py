"""Weights in any scheme on onnxruntime: what reads their pieces, by scheme, and the lowerings that ask.

A kernel here is a function that gives a product with a weight from its pieces. Most bring the codes into a
form that MatMulNBits takes, by operators over weights alone: onnxruntime computes these once, when it loads
the model, and packs the result as it packs codes that come so. What has no kernel is widened to float32 by
its meaning in standard operators, which are computed once too: the memory and the speed of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor, fx

from ...ir.ops import einfold_ops
from ...ir.ops.quantized import StoredEmbedding, meaning_of_pieces
from ...ir.program import call_arguments
from ...ir.quant.scheme import Scheme, read_scheme
from .einfold_ops import product
from .experts import Project, expert_slice, route
from .fallback import lower_by_torch
from .integers import integer_product, of_integers
from .kernels import WIDE, runtime_bits
from .lowerings import Context, lowering
from .stored_weight import Stored
from .widen import widened

Kernel = Callable[[Stored, ir.Value, ir.Value | None], ir.Value]

_KERNELS: dict[type[Scheme], Kernel] = {}


def kernel_of(kind: type[Scheme]) -> Callable[[Kernel], Kernel]:
    """Registers the kernel of a scheme: from pieces, x [.., M] and a bias [N] to x @ weight.T + bias.

    It is asked where `runtime_bits` says that there is one."""

    def register(function: Kernel) -> Kernel:
        _KERNELS[kind] = function
        return function

    return register


def matmul(stored: Stored, x: ir.Value, bias: ir.Value | None) -> ir.Value | None:
    """The product by the scheme's kernel, if it has one for these options."""
    context, scheme = stored.context, stored.scheme
    if runtime_bits(scheme, context.accuracy_level != 4, context.flavour) == WIDE:
        return None
    return _KERNELS[type(scheme)](stored, x, bias)


@lowering(einfold_ops.stored_linear.default)
def stored_linear(context: Context, node: fx.Node) -> ir.Value:
    """A product of integers, the scheme's kernel, or a product with the weight that the pieces mean."""
    found = context.arguments(node)
    scheme, shape = read_scheme(found["scheme"]), found["shape"]
    bias = context.optional(found["bias"])
    named = scheme.named(found["pieces"], shape)
    stored = Stored(context, scheme, named, *shape)
    if of_integers(found["x"], scheme):
        return integer_product(stored, found["x"], bias)
    out = matmul(stored, context.value(found["x"]), bias)
    if out is not None:
        return out
    weight = _whole(context, node, scheme, named, shape)
    return product(context, found["x"], weight, bias, node)


def _whole(
    context: Context,
    node: fx.Node,
    scheme: Scheme,
    named: Mapping[str, fx.Node],
    shape: Sequence[int],
) -> ir.Value:
    """The weight of a shape in float32."""
    values = {label: _initializer(context, piece) for label, piece in named.items()}
    found = widened(context, scheme, values, len(shape) - 1, shape[-1])
    return _by_torch(context, node, scheme, named, shape) if found is None else found


def _initializer(context: Context, node: fx.Node) -> ir.Value:
    return context.builder.weight(context.weight_name(node))


def _by_torch(
    context: Context,
    node: fx.Node,
    scheme: Scheme,
    named: Mapping[str, fx.Node],
    shape: Sequence[int],
) -> ir.Value:
    """The same by the scheme's arithmetic in torch; the exporter is given all that the node is."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = [call_arguments(node)[name] for name in names]
    place = next(at for at, value in enumerate(given) if value == [*named.values()])

    def meaning(*arguments: Any) -> Tensor:
        return meaning_of_pieces(arguments[place], str(scheme), shape)

    found = lower_by_torch(context, node, meaning, names[place])
    assert isinstance(found, ir.Value)
    return found


@lowering(einfold_ops.stored_embedding.default)
def stored_embedding(context: Context, node: fx.Node) -> ir.Value:
    """Gathers the rows' pieces, then unpacks those alone."""
    arguments = context.arguments(node)
    scheme, shape = read_scheme(arguments["scheme"]), arguments["shape"]
    ids, builder = arguments["ids"], context.builder
    values = {}
    for label, piece in scheme.named(arguments["pieces"], shape).items():
        values[label] = _initializer(context, piece)
        if label not in scheme.shared:
            values[label] = builder.op("Gather", values[label], context.value(ids), axis=0)
    found = widened(context, scheme, values, len(context.shape(ids)), shape[-1])
    if found is not None:
        return found
    by_torch = lower_by_torch(context, node, StoredEmbedding.standing_in(StoredEmbedding.run))
    assert isinstance(by_torch, ir.Value)
    return by_torch


@lowering(einfold_ops.dequantize.default)
def dequantize(context: Context, node: fx.Node) -> ir.Value:
    """A weight that is read as a whole."""
    found = context.arguments(node)
    scheme, shape = read_scheme(found["scheme"]), found["shape"]
    return _whole(context, node, scheme, scheme.named(found["pieces"], shape), shape)


@lowering(einfold_ops.stored_experts.default)
def stored_experts(context: Context, node: fx.Node) -> ir.Value:
    """Each expert by the scheme's kernel over its part of the stacked pieces; without one, both stacks are
    widened."""
    found = context.arguments(node)
    count = int(found["gate_up_shape"][0])
    projects = [_project(context, node, part, found) for part in ("gate_up", "down")]
    return route(context, found, count, *projects)


def _project(context: Context, node: fx.Node, part: str, found: dict[str, Any]) -> Project:
    builder, scheme = context.builder, read_scheme(found["scheme"])
    pieces, shape, bias = (found[f"{part}_{of}"] for of in ("pieces", "shape", "bias"))
    named = scheme.named(pieces, shape)
    wide: list[ir.Value] = []

    def project(expert: int, x: ir.Value) -> ir.Value:
        stored = Stored(context, scheme, named, shape[1], shape[2], expert)
        own = None if bias is None else expert_slice(context, bias, expert)
        out = matmul(stored, x, own)
        if out is not None:
            return out
        if not wide:
            wide.append(_whole(context, node, scheme, named, shape))
        index = builder.constant(expert, np.int64)
        matrix = builder.shared("Gather", wide[0], index, axis=0)
        return builder.op("Gemm", x, matrix, own, transB=1)

    return project
