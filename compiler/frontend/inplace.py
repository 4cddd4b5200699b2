"""In-place operators on scores that nothing else holds become what they compute.

    s = q @ k.mT                      s = q @ k.mT
    s.div_(8)                   ->    t = s / 8
    s.masked_fill_(dead, -inf)        u = masked_fill(t, dead, -inf)

Only memory that the graph made itself, and of which nothing else is read afterwards: no caller's tensor, no
cache, nothing that has a view. All others stay in place and in order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .aten_kinds import CONTRACTIONS, CREATION, name_of
from .cascade.elementwise import RULES

aten = torch.ops.aten

#: What writes to memory of its own, always; of `to` or `dropout` one cannot be sure.
_FRESH = set(RULES) | CONTRACTIONS | CREATION | {"softmax", "clone", "tril", "triu", "full_like"}
_FRESH |= {"zeros_like", "ones_like", "masked_fill", "linear"}
_PURE = set(RULES) | {"tril", "triu"}


def out_of_place(graph: fx.Graph) -> None:
    """Replaces such operators, in order, so that a chain of them goes one after the other."""
    places = {node: at for at, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        pure = _pure_of(node)
        if pure is None or not _is_alone(node, places):
            continue
        node.target, node.args = pure


def _pure_of(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The operator without the write and its arguments, where it computes the same."""
    target, name = node.target, name_of(node)
    if not isinstance(target, torch._ops.OpOverload) or not name.endswith("_"):
        return None
    if name == "index_put_":
        return _selection(node)
    pure = getattr(getattr(aten, name[:-1], None), target._overloadname, None)
    if name[:-1] not in _PURE or pure is None or not _keeps_its_type(node):
        return None
    taken = [(a.name, a.kwarg_only) for a in target._schema.arguments]
    same = taken == [(a.name, a.kwarg_only) for a in pure._schema.arguments]
    return (pure, node.args) if same else None


def _selection(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """s[dead] = number, with a truth value for each place of s."""
    scores, indices, number = node.args[:3]
    if len(node.args) > 3 or not isinstance(indices, (list, tuple)) or len(indices) != 1:
        return None
    dead, value = (getattr(item, "meta", {}).get("val") for item in (indices[0], number))
    if not isinstance(dead, torch.Tensor) or not isinstance(value, torch.Tensor):
        return None
    if dead.dtype != torch.bool or value.ndim or dead.ndim != _value(scores).ndim:
        return None
    return aten.masked_fill.Tensor, (scores, indices[0], number)


def _value(node: Any) -> torch.Tensor:
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def _keeps_its_type(node: fx.Node) -> bool:
    """Whether the result has the type of what was written to, promoted by none of the arguments."""
    own = _value(node.args[0]).dtype
    others = [
        _value(arg).dtype for arg in node.args[1:] if isinstance(arg, fx.Node) and _is_tensor(arg)
    ]
    return own.is_floating_point and all(torch.promote_types(own, d) == own for d in others)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_alone(node: fx.Node, places: dict[fx.Node, int]) -> bool:
    """Whether what is written to was made here, has no view, and is not read later."""
    written = node.args[0]
    if not isinstance(written, fx.Node) or not _is_fresh(written):
        return False
    others = [user for user in written.users if user is not node]
    return all(places[user] < places[node] and _reads_only(user, written) for user in others)


def _reads_only(user: fx.Node, written: fx.Node) -> bool:
    """Whether a reader keeps nothing of the memory; some look at no more than its shape."""
    looks = name_of(user) in ("expand_as", "view_as", "type_as") and user.args[0] is not written
    return looks or _is_fresh(user)


def _is_fresh(node: fx.Node) -> bool:
    """Whether the result has memory of its own; an einsum of one tensor may be a view of it."""
    alone = name_of(node) == "einsum" and len(node.all_input_nodes) < 2
    return name_of(node) in _FRESH and not alone
