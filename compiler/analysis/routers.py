"""Which linears choose experts."""

from __future__ import annotations

import torch
from torch import fx

from ..ir.ops import einfold_ops
from ..ir.program import Program

aten = torch.ops.aten


def routers(program: Program) -> set[fx.Node]:
    """Linears whose results are ranked: those that are met first on the way back from a topk.

    The way goes through whatever scales, masks or groups scores; einfold's other operators end it.
    """
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    waiting = list(program.nodes(aten.topk.default))
    while waiting:
        node = waiting.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if node.target is einfold_ops.linear.default:
            found.add(node)
        elif getattr(node.target, "namespace", "") != "einfold":
            waiting += node.all_input_nodes
    return found
