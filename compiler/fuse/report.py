"""The entries of reports on fusion: one a region of a graph."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

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


def place_in_model(node: fx.Node) -> str:
    """The module that a node belongs to, such as layers.3.self_attn, or else the node's name."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values() if isinstance(entry, tuple)]
    if not paths:
        return str(node.name)
    path = paths[-1].replace("L['self']", "")
    return re.sub(r"\[['\"]?(\w+)['\"]?\]|\._modules", r".\1", path).strip(".") or str(node.name)
