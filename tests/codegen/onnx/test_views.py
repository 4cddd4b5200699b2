"""Operators that rearrange, repeat, pad and scatter, each in ONNX's own, at the sizes given and at others."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import pad

import einfold
from einfold.compiler.codegen.onnx import lower

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten the last": lambda x: x.flatten(2),
    "flatten the middle": lambda x: x.flatten(1, 2),
    "flatten all": lambda x: x.flatten(),
    "unflatten the last": lambda x: x.unflatten(-1, (2, -1)),
    "unflatten what varies": lambda x: x.unflatten(1, (-1, 1)),
    "unflatten the middle": lambda x: x.unflatten(2, (1, 3)),
    "repeat the middle": lambda x: x.repeat_interleave(3, 1),
    "repeat the last": lambda x: x.repeat_interleave(2, -1),
    "repeat all": lambda x: x.repeat_interleave(2),
    "pad": lambda x: pad(x, (1, 2)),
    "pad and cut": lambda x: pad(x, (0, -1, 2, 1), value=-math.inf),
    "pad truth": lambda x: pad(x > 0, (0, 2)),
    "pad short integers": lambda x: pad((x * 9).to(torch.int16), (0, 2), value=3),
    "turn": lambda x: x.mT,
    "turn by another name": lambda x: x.mH,
    "view as": lambda x: x.view_as(x.mT.contiguous()) * 2,
    "expand as": lambda x: x[:, :, :1].expand_as(x) + 1,
    "scatter": lambda x: x.scatter(2, x.long() % 3, x),
    "scatter a part": lambda x: x.scatter(3, x[:, :, :1].long() % 4, x),
}


class Each(nn.Module):
    """Every view of one tensor, with numbers that a wrong place would show."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(x) for function in VIEWS.values())


@pytest.mark.parametrize("vary", [False, True], ids=["fixed", "varying"])
def test_views(vary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export's own check compares the numbers, and a second size."""
    through_torch = []
    was = lower.lower_by_torch

    def watched(context: Any, node: Any) -> Any:
        through_torch.append(str(node.target))
        return was(context, node)

    monkeypatch.setattr(lower, "lower_by_torch", watched)
    shapes = ({0: Dim("batch"), 1: Dim("rows")},) if vary else None
    x = 9 * torch.randn(2, 5, 3, 4)
    einfold.export_onnx(Each(), tmp_path / "a", (x,), dynamic_shapes=shapes)
    assert set(through_torch) == {"aten.remainder.Scalar"}
