"""Weights of a graph that Dynamo hands over, stored in a scheme: for callers who have frozen them.

Before: %y = linear(%x, %weight, %bias)                                     %weight: the graph's attribute
After:  %y = einfold.stored_linear(%x, [%pieces], %bias, scheme, shape)      on a CPU
        %y = einfold_triton.product(%x, [%pieces], %bias, scheme, shape)     on a GPU, by kernels
With activations in int8 %x goes through einfold.round_to_int8 first, on a GPU within the product.

In torch 2.13 Dynamo makes parameters attributes of the graph where they are frozen
(`torch._inductor.config.freezing`, without gradients), and inputs of it otherwise, which a call may change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._dynamo.source import AttrSource

from ..errors import IRError, RecipeError
from .codegen.triton.device import without_kernels
from .codegen.triton.linear.decoder import decoder_of
from .codegen.triton.linear.kinds import no_kernel, type_of
from .codegen.triton.linear.through import pieces_for_kernels
from .ir.ops import einfold_ops
from .ir.quant.scheme import PRESETS, Scheme, find_scheme
from .solve.round_to_nearest import RoundToNearest

#: As Dynamo says it, and as the backend's own graphs do.
_LINEARS = (torch._C._nn.linear, torch.ops.aten.linear.default)

#: What to do about weights that are inputs of the graph.
NOT_FROZEN = (
    "the graph takes its weights as inputs, which a call may change; freeze them: set "
    "torch._inductor.config.freezing = True and call under torch.no_grad()"
)


def scheme_named(text: str) -> Scheme:
    """The scheme of a preset's name ("int4") or of a scheme's text. Raises RecipeError for neither."""
    try:
        return find_scheme(text)
    except IRError as error:
        known = ", ".join(name for name, each in PRESETS.items() if each.scheme is not None)
        raise RecipeError(
            f"option weights is {text[:80]!r}; it can be {known}, or a scheme's text"
        ) from error


@dataclass(frozen=True)
class Frozen:
    """How many weights were stored, and why others were not."""

    stored: int
    reason: str = ""


def activations_for(scheme: Scheme, asked: str | None) -> str:
    """What linears read, "f32" or "int8": what was asked for, or the scheme's own. Raises RecipeError where
    it cannot be."""
    if asked not in (None, "f32", "int8"):
        raise RecipeError(f"option activations is {str(asked)[:80]!r}; it can be f32 or int8")
    if asked == "int8" and not scheme.integer_rows:
        raise RecipeError(
            "option activations = int8 is for weights that are integers with one scale a row, not for "
            f"{scheme.describe()}; use the weights grouped(bits=8,block=0) or qserve"
        )
    return asked or scheme.activations


def store_frozen_weights(gm: fx.GraphModule, scheme: Scheme, activations: str = "f32") -> Frozen:
    """Stores the weights of the graph's linears, rounded to nearest, in place. A weight is stored once.

    With `activations` "int8" linears read theirs in 8 bits, all of them: which one is a head is not known.
    The caller's module keeps its own weights: their memory is freed when the caller lets go of them.
    """
    linears = [node for node in gm.graph.nodes if node.target in _LINEARS]
    if not linears:
        return Frozen(0, "the graph has no linear")
    frozen = [node for node in linears if _weight(gm, node) is not None]
    if not frozen:
        return Frozen(0, NOT_FROZEN)
    done: dict[str, tuple[list[fx.Node], list[int]]] = {}
    reasons: dict[str, None] = {}
    for node in frozen:
        reason = _replace(gm, node, scheme, activations, done)
        if reason:
            reasons[reason] = None
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.recompile()
    if len(frozen) < len(linears):
        reasons[
            f"{len(linears) - len(frozen)} linears have weights that are no attributes of the graph"
        ] = None
    return Frozen(len(done), "; ".join(reasons))


def _weight(gm: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The weight of a linear that is an attribute of the graph, else None."""
    if len(node.args) < 2 or node.kwargs:
        return None
    read = node.args[1]
    if not isinstance(read, fx.Node) or read.op != "get_attr":
        return None
    found: object = gm
    for part in str(read.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, Tensor) and found.ndim == 2 else None


def _replace(
    gm: fx.GraphModule,
    node: fx.Node,
    scheme: Scheme,
    activations: str,
    done: dict[str, tuple[list[fx.Node], list[int]]],
) -> str:
    """Has a linear read its weight as it is stored; gives the reason where it cannot."""
    weight, read = _weight(gm, node), node.args[1]
    assert weight is not None and isinstance(read, fx.Node)
    kernels, integers = not without_kernels(weight.device.type), activations == "int8"
    if kernels and (decoder_of(scheme, integers) is None or not type_of(weight.dtype)):
        return no_kernel(str(weight.dtype), scheme, integers)
    name = str(read.target)
    if name not in done:
        ordered = activations if kernels else ""
        done[name] = _stored(gm, read, weight, scheme, ordered), list(weight.shape)
    pieces, shape = done[name]
    bias = node.args[2] if len(node.args) > 2 else None
    target = (
        torch.ops.einfold_triton.product.default if kernels else einfold_ops.stored_linear.default
    )
    with gm.graph.inserting_before(node):
        x = node.args[0]
        # The operator's meaning is in float32; a kernel takes what it is given.
        narrow = not kernels and weight.dtype != torch.float32
        if narrow:
            x = gm.graph.call_method("float", (x,))
            bias = bias if bias is None else gm.graph.call_method("float", (bias,))
        if integers and not kernels:
            x = gm.graph.call_function(einfold_ops.round_to_int8.default, (x,))
        more = (activations,) if kernels else ()
        new = gm.graph.call_function(target, (x, pieces, bias, str(scheme), shape, *more))
        if narrow:
            new = gm.graph.call_method("to", (new, weight.dtype))
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return ""


def _name_source(gm: fx.GraphModule, weight: str, name: str, at: int) -> None:
    """Says of a piece where it comes from, as Dynamo says it of every attribute of its graphs.

    AOTAutograd asks, to guard against two names of one tensor, and refuses an attribute without an answer.
    """
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None and weight in sources:
        sources[name] = AttrSource(sources[weight], f"piece{at}")


def _stored(
    gm: fx.GraphModule, read: fx.Node, weight: Tensor, scheme: Scheme, ordered: str
) -> list[fx.Node]:
    """Nodes of the pieces; in the order of kernels for such activations where it is not ""."""
    found = RoundToNearest().solve(weight.detach().float(), scheme, {}).pieces
    pieces: Sequence[Tensor] = [found[label] for label in scheme.pieces(tuple(weight.shape))]
    if ordered:
        pieces = pieces_for_kernels(scheme, weight.shape, pieces, ordered)
    nodes = []
    with gm.graph.inserting_before(read):
        for at, piece in enumerate(pieces):
            name = f"{str(read.target).replace('.', '_')}_piece{at}"
            gm.register_buffer(name, piece)
            _name_source(gm, str(read.target), name, at)
            nodes.append(gm.graph.get_attr(name))
    return nodes
