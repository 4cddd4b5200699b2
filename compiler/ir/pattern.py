"""Small patterns over graph nodes: calls, captured nodes and captured numbers, order-blind for add and mul.

SILU_GATE = Call(aten.mul.Tensor, Call(aten.silu.default, Node("gate")), Node("up"))
match(SILU_GATE, node)  ->  {"gate": %a, "up": %b} or None
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_COMMUTATIVE = {torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor}

Bindings = dict[str, Any]


@dataclass(frozen=True)
class Node:
    """Any node; the same name must meet the same node again. `where` narrows which."""

    name: str
    where: Callable[[fx.Node], bool] | None = None


@dataclass(frozen=True)
class Number:
    """A Python number, captured; with `value`, that number up to rounding."""

    name: str = ""
    value: float | None = None


class Call:
    """A call of one of several operators with these arguments; missing trailing ones are not looked at."""

    def __init__(
        self, target: Callable[..., Any] | tuple[Callable[..., Any], ...], *args: Any
    ) -> None:
        self.targets = target if isinstance(target, tuple) else (target,)
        self.args = args


@dataclass(frozen=True)
class Either:
    """The first alternative that matches."""

    options: tuple[Any, ...]


def match(pattern: Any, value: Any, bound: Bindings | None = None) -> Bindings | None:
    """What the pattern captures, or None. `bound` holds what is captured already."""
    bound = dict(bound or {})
    if isinstance(pattern, Either):
        for option in pattern.options:
            if (found := match(option, value, bound)) is not None:
                return found
        return None
    if isinstance(pattern, Node):
        return _match_node(pattern, value, bound)
    if isinstance(pattern, Number):
        return _match_number(pattern, value, bound)
    if isinstance(pattern, Call):
        return _match_call(pattern, value, bound)
    if isinstance(pattern, list):  # FX keeps lists as its own immutable kind
        return bound if isinstance(value, (list, tuple)) and pattern == list(value) else None
    return bound if type(pattern) is type(value) and pattern == value else None


def _match_node(pattern: Node, value: Any, bound: Bindings) -> Bindings | None:
    if not isinstance(value, fx.Node) or bound.get(pattern.name, value) is not value:
        return None
    if pattern.where is not None and not pattern.where(value):
        return None
    return bound | {pattern.name: value}


def _match_number(pattern: Number, value: Any, bound: Bindings) -> Bindings | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if pattern.value is not None and abs(value - pattern.value) > 1e-6 * max(
        1.0, abs(pattern.value)
    ):
        return None
    return bound | ({pattern.name: value} if pattern.name else {})


def _match_call(pattern: Call, value: Any, bound: Bindings) -> Bindings | None:
    if (
        not isinstance(value, fx.Node)
        or value.op != "call_function"
        or value.target not in pattern.targets
    ):
        return None
    if len(value.args) < len(pattern.args):
        return None
    orders = [tuple(value.args)]
    if value.target in _COMMUTATIVE and len(pattern.args) == 2:
        orders.append((value.args[1], value.args[0]))
    for order in orders:
        found: Bindings | None = bound
        for part, argument in zip(pattern.args, order, strict=False):
            found = match(part, argument, found) if found is not None else None
        if found is not None:
            return found
    return None
