"""Regions as graphs of their own, where they may be moved to, and a key under which equal ones are found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..frontend.aten_kinds import VIEWS, name_of
from .regions import Region


def extract(region: Region) -> fx.Graph:
    """The region with its inputs as placeholders; nodes keep their names and values."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in region.inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = {"val": node.meta.get("val")}
    for node in region.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in region.outputs))
    return graph


def key_of(region: Region) -> str:
    """The region's text with nodes by number and symbols by order of appearance.

    Regions of one key compute the same on tensors of the same sizes, up to which symbol is which.
    """
    numbers = {node: f"%{at}" for at, node in enumerate((*region.inputs, *region.nodes))}
    lines = [f"{numbers[n]} : {_value(n.meta.get('val'))}" for n in region.inputs]
    for node in region.nodes:
        text = _text(node.args, numbers), _text(node.kwargs, numbers)
        lines.append(
            f"{numbers[node]} = {node.target}{text[0]}{text[1]} : {_value(node.meta.get('val'))}"
        )
    lines.append(f"return {[numbers[node] for node in region.outputs]}")
    names: dict[str, str] = {}
    return re.sub(
        r"\b(?:[su]|zu?f)\d+\b",
        lambda m: names.setdefault(m.group(0), f"n{len(names)}"),
        "\n".join(lines),
    )


def _text(value: Any, numbers: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}={_text(v, numbers)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_text(item, numbers) for item in value) + ")"
    return str(value)


def _value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}{list(value.stride())}{value.device}"
    if isinstance(value, (list, tuple)):
        return str([_value(item) for item in value])
    return str(value)


@dataclass(frozen=True)
class Place:
    """Where the region may stand as one piece: ahead of `before`; or why it may stand nowhere."""

    before: fx.Node | None
    reason: str = ""


def place_of(region: Region, order: Sequence[fx.Node]) -> Place:
    """Behind all that the region reads, ahead of all that reads it, with no write to either between.

    In-place updates of a cache happen in the graph's order; a read may not cross one.
    """
    at = {node: place for place, node in enumerate(order)}
    inside = set(region.nodes)
    users = [user for node in region.outputs for user in node.users if user not in inside]
    if not users:
        return Place(None, "nothing reads it")
    first_use = min(at[user] for user in users)
    last_input = max((at[node] for node in region.inputs), default=-1)
    if last_input >= first_use:
        return Place(None, "something reads it before all that it needs is there")
    start = min(at[node] for node in region.nodes)
    # As early as it was complete, so that it is moved across as little as can be.
    first_use = min(first_use, max(at[node] for node in region.nodes) + 1)
    touched = {_root(node) for node in (*region.inputs, *region.nodes)}
    for node in order[start:first_use]:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            for argument, value in zip(target._schema.arguments, node.args, strict=False):
                alias = argument.alias_info
                if alias is None or not alias.is_write or not isinstance(value, fx.Node):
                    continue
                # What an update returns is read as updated; it is the earlier reads that must not cross.
                if _root(value) in touched and not _all_after(region, at, at[node], _root(value)):
                    return Place(None, f"{node.name} writes in place to what it reads")
    return Place(order[first_use])


def _all_after(region: Region, at: dict[fx.Node, int], write: int, root: fx.Node) -> bool:
    """Whether all reads of an aliased tensor by the region come after a write."""
    for node in region.nodes:
        for arg in node.all_input_nodes:
            if _root(arg) is root and at[node] < write:
                return False
    return True


def _root(node: fx.Node) -> fx.Node:
    """The node whose memory a value may share: through views and in-place operators."""
    while True:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not node.args:
            return node
        schema = target._schema
        shares = any(r.alias_info is not None for r in schema.returns) or name_of(node) in VIEWS
        first = node.args[0]
        if not shares or not isinstance(first, fx.Node):
            return node
        node = first
