"""What may be true of a program: the facts that passes require and ensure, each checked on the program.

A fact is a property of the program as it stands, not of what ran: a pass that claims one that it did not
bring about is caught, and so is one that undoes what a later pass needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from ...errors import IRError
from ..ir.ops import einfold_ops
from ..ir.pattern import match
from ..ir.program import Program, cache_writers, call_arguments
from .raising.raise_norms import NORMED, over_last_axis

aten = torch.ops.aten

Holds = Callable[[Program], bool]

#: Facts by name; the first line of a function says what it means.
FACTS: dict[str, Holds] = {}


def fact(name: str) -> Callable[[Holds], Holds]:
    """Registers a fact."""

    def register(holds: Holds) -> Holds:
        FACTS[name] = holds
        return holds

    return register


def failing(program: Program, names: frozenset[str]) -> str:
    """The first of these facts that does not hold, with what it says; "" where all hold.

    Raises IRError for a name that no fact has.
    """
    for name in sorted(names):
        if name not in FACTS:
            raise IRError(f"unknown fact {name!r}; known: {', '.join(sorted(FACTS))}")
        if not FACTS[name](program):
            return f"{name!r}: {FACTS[name].__doc__}"
    return ""


@fact("linears raised")
def linears_raised(program: Program) -> bool:
    """No product with a weight and no embedding is in ATen's spelling."""
    spelled = program.nodes(aten.linear.default, *PRODUCTS, aten.embedding.default)
    return not any(weight_factor(program, node) for node in spelled)


@fact("norms raised")
def norms_raised(program: Program) -> bool:
    """No RMSNorm is spelled out, and no layer_norm over the last axis is in ATen's spelling."""
    return not any(match(NORMED, node) for node in program.nodes(aten.mul.Tensor)) and not any(
        over_last_axis(node) for node in program.nodes(aten.layer_norm.default)
    )


@fact("cache planned")
def cache_planned(program: Program) -> bool:
    """Every attention has its row in the cache layout, and none has its cache yet."""
    rows = set() if program.layout is None else {cache.layer for cache in program.layout.layers}
    bare = program.nodes(einfold_ops.attention.default)
    return rows.issuperset(int(call_arguments(node)["layer"]) for node in bare) and not any(
        cache_writers(program)
    )


@fact("cache attached")
def cache_attached(program: Program) -> bool:
    """No attention is left without its cache."""
    return not any(program.nodes(einfold_ops.attention.default))


#: Products with a matrix, which may be a weight.
PRODUCTS = (aten.addmm.default, aten.mm.default, aten.matmul.default)


def weight_factor(program: Program, node: fx.Node) -> fx.Node | None:
    """The weight [N, M] or [M, N] that a linear, an embedding or a plain product reads, else None.

    A product that is scaled on the way (`alpha`, `beta`) is no plain one.
    """
    found = call_arguments(node)
    if found.get("alpha", 1) != 1 or found.get("beta", 1) != 1:
        return None
    matrix = next(found[name] for name in ("weight", "mat2", "other") if name in found)
    weight = program.weight_of(matrix)
    return matrix if weight is not None and len(weight.shape) == 2 else None
