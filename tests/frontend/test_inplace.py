"""In-place operators: those on what the graph alone holds become pure, all others stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from einfold.compiler.frontend.dynamo import example_values, fake_mode_of, to_aten


def mutable(function: Callable[..., Any], *inputs: Tensor) -> list[str]:
    """The operators of the ATen graph that still write."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        values = example_values(gm)
        mode = fake_mode_of(values)
        assert mode is not None
        graphs.append(to_aten(gm, values, mode))
        forward: Callable[..., Any] = graphs[-1].forward
        return forward

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(function, backend=keep)(*(x.clone() for x in inputs))
        expected = function(*(x.clone() for x in inputs))
    torch.testing.assert_close(found, expected)
    (graph,) = graphs
    targets = [node.target for node in graph.graph.nodes]
    return [
        t._schema.name.split("::")[1]
        for t in targets
        if isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable
    ]


def scores_in_place(q: Tensor, k: Tensor, dead: Tensor) -> Tensor:
    s = q @ k.mT
    s /= math.sqrt(8)
    s += torch.arange(6)
    s.tanh_().mul_(5.0)
    return s.masked_fill_(dead, -math.inf).softmax(-1)


def by_index(q: Tensor, k: Tensor, dead: Tensor) -> Tensor:
    s = q @ k.mT
    s[dead.expand_as(s)] = -1e9
    return s.softmax(-1)


def an_argument(q: Tensor, k: Tensor, dead: Tensor) -> Tensor:
    q.mul_(2.0)
    return q @ k.mT


def with_a_view(q: Tensor, k: Tensor, dead: Tensor) -> Tensor:
    s = q @ k.mT
    first = s[0]
    s.mul_(2.0)
    return s.sum() + first.sum()


def of_a_view(q: Tensor, k: Tensor, dead: Tensor) -> Tensor:
    s = q @ k.mT
    s[0].mul_(2.0)
    return s


def of_a_turned_view(q: Tensor, k: Tensor, dead: Tensor) -> Tensor:
    s = q @ k.mT
    torch.einsum("st->ts", s).mul_(2.0)
    return s


def narrower(q: Tensor, k: Tensor, dead: Tensor) -> Tensor:
    s = (q @ k.mT).to(torch.float16)
    s = s * 2
    s.add_(q @ k.mT)
    return s


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (scores_in_place, []),
        (by_index, []),
        (an_argument, ["mul_"]),
        (with_a_view, ["mul_"]),
        (of_a_view, ["mul_"]),
        (of_a_turned_view, ["mul_"]),
        (narrower, ["add_"]),
    ],
)
def test_what_stays_in_place(function: Callable[..., Any], left: list[str]) -> None:
    torch.manual_seed(0)
    dead = torch.rand(4, 6) < 0.3
    assert mutable(function, torch.randn(4, 8), torch.randn(6, 8), dead) == left
