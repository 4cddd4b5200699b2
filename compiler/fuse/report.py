"""The entries of reports on fusion: one a region of a graph."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from ..ir.cascade.printer import print_cascade
from .folded import Folded

#: The lowering of a region that stays in the graph.
AS_WRITTEN = "as written"


@dataclass(frozen=True)
class FusedCascade:
    """One region in the report.

    `lowering` names what runs in its place; `source` is that as code; `seconds` has what was measured.
    """

    where: str
    status: str
    passes_before: int
    passes_after: int
    reason: str
    lowering: str
    source: str = ""
    cascade: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)


def entry(
    anchor: fx.Node,
    folded: Folded | None,
    lowering: str,
    reason: str,
    source: str = "",
    seconds: Mapping[str, float] | None = None,
) -> FusedCascade:
    """The entry of a region: what it was folded to, and what runs in its place or why nothing does."""
    folding = folded.folding if folded is not None else None
    left = lowering == AS_WRITTEN
    if folding is not None and not folding.refusals and not left:
        reason = folding.reason
    return FusedCascade(
        place_in_model(anchor),
        "refused" if left else "fused",
        folding.passes_before if folding else 0,
        folding.passes_after if folding else 0,
        reason,
        lowering,
        source,
        print_cascade(folded.imported.cascade) if folded is not None else "",
        seconds or {},
    )


def source_of(folded: Folded, graph: fx.Graph) -> str:
    """What runs in a region's place as code, under the cascade as a comment."""
    cascade = print_cascade(folded.imported.cascade).splitlines()[1:]
    code = fx.GraphModule({}, graph).code if not graph.find_nodes(op="get_attr") else str(graph)
    comment = "".join(f"# {line}\n" for line in cascade)
    return f"{comment}{code.strip().replace('def forward(self, ', 'def fused(')}\n"


def place_in_model(node: fx.Node) -> str:
    """The module that a node belongs to, such as layers.3.self_attn, or else the node's name."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values() if isinstance(entry, tuple)]
    if not paths:
        return str(node.name)
    path = paths[-1].replace("L['self']", "")
    return re.sub(r"\[['\"]?(\w+)['\"]?\]|\._modules", r".\1", path).strip(".") or str(node.name)
