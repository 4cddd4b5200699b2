"""A region of a graph as a cascade, folded over the rank that is streamed: where every road begins.

graph -> region -> cascade -> plan        and from there each road asks for the lowerings that it has
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from ...errors import EinfoldError, UnsupportedError
from ..analysis.cascade.choose import choose_rank
from ..analysis.cascade.fold import Folding
from ..analysis.cascade.plans import fold
from ..codegen.cpu.frame import Signature
from ..frontend.aten_kinds import CONTRACTIONS, REPEATS, VIEWS, WHOLE, name_of
from ..frontend.cascade.imported import Imported
from ..frontend.cascade.importer import import_graph
from ..ir.cascade.plan import Plan
from .regions import Region, region_at
from .subgraphs import extract

#: Takes tensors that a region reads, and gives what it gives.
Function = Callable[..., tuple[torch.Tensor, ...]]

#: Makes a lowering of a plan: a function of the signature's inputs. One that cannot express the plan raises
#: NotLoweredError, when it is made or when it is called.
Maker = Callable[[Plan, Signature], Function]


@dataclass(frozen=True)
class Folded:
    """A cascade and its folding; without a plan, `reason` says why."""

    imported: Imported
    folding: Folding | None
    reason: str = ""

    @property
    def plan(self) -> Plan | None:
        """The one pass that it was folded to, or None."""
        return self.folding.plan if self.folding is not None else None


def import_region(graph: fx.Graph, region: Region) -> tuple[Region, Imported]:
    """The region's cascade. Nodes that become inputs of it are left outside, and what only they used.

    Raises UnsupportedError where the region is no cascade.
    """
    outside: set[fx.Node] = set()
    places = {node: at for at, node in enumerate(graph.nodes)}
    for _ in range(8):
        imported = import_graph(extract(region))
        if not imported.opaque:
            return region, imported
        outside |= {node for node in region.nodes if node.name in imported.opaque}
        smaller = region_at(region.anchor, places, outside, region.unreduced)
        if smaller is None:
            name, why = next(iter(imported.opaque.items()))
            raise UnsupportedError(f"{name}: {why}")
        region = smaller
    raise UnsupportedError("the region keeps changing while it is imported")


def folded(imported: Imported) -> Folded:
    """The folding of a region's cascade."""
    try:
        rank = choose_rank(imported.cascade, imported.sizes)
        if not rank:
            return Folded(imported, None, "nothing is reduced")
        folding = fold(imported.cascade, rank)
    except EinfoldError as error:
        return Folded(imported, None, f"not folded: {error}")
    return Folded(imported, folding, "" if folding.plan is not None else folding.reason)


def signature_of(region: Region, imported: Imported) -> Signature:
    """The tensors that a lowering of the region takes and gives."""
    dtypes = {node.name: node.meta["val"].dtype for node in region.outputs}
    return Signature(
        tuple((b.name, b.dims) for b in imported.inputs),
        tuple((b.name, b.dims) for b in imported.outputs),
        imported.sizes,
        tuple(dtypes[b.node] for b in imported.outputs),
        _operators(region),
    )


def _operators(region: Region) -> tuple[str, ...]:
    """What scores are computed with from the first product on, but for views and factors that are numbers.

    What repeats operands ahead of it counts too, for keys and values are copied by that.
    """
    found: list[str] = []
    scores: set[fx.Node] = set()
    for node in region.nodes:
        name = name_of(node)
        if name not in CONTRACTIONS | WHOLE and not scores.intersection(node.all_input_nodes):
            if name in REPEATS and node.meta["val"].dtype.is_floating_point:
                found.append(name)
            continue
        scores.add(node)
        scales = name in ("mul", "div") and not isinstance(node.args[1], fx.Node)
        if name in ("softmax", "_softmax") and node.args[1] not in (-1, node.meta["val"].ndim - 1):
            name = "softmax over another axis"
        if name and name not in VIEWS and not scales:
            found.append(_SAME.get(name, name))
    return tuple(found)


_SAME = {"bmm": "matmul", "mm": "matmul", "_softmax": "softmax"}


def reads_of(region: Region, imported: Imported) -> tuple[int, ...]:
    """Which of the region's inputs a lowering takes, by place."""
    names = [node.name for node in region.inputs]
    return tuple(names.index(binding.node) for binding in imported.inputs)
