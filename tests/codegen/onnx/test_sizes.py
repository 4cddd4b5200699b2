"""Tensors made of sizes that are known only at run time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import einfold


class Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: torch.cat([x, torch.zeros(x.shape[0], 1, 4)], 1),
    "ones": lambda x: torch.cat([x, torch.ones(x.shape[0], x.shape[1], 1)], 2),
    "full": lambda x: torch.full((x.shape[0], x.shape[1]), 2.5) + x[:, :, 0],
    "full of a tensor": lambda x: x.new_full((x.shape[1],), 3).cumsum(0),
    "empty, then filled": lambda x: torch.empty(x.shape[0], x.shape[1]).fill_(2) + x[:, :, 0],
    "new_zeros": lambda x: x.new_zeros(x.shape[0], x.shape[1], dtype=torch.long) + x[..., 0],
    "new_ones": lambda x: x * x.new_ones(x.shape[1], 1),
    "new_empty, then filled": lambda x: x.new_empty(x.shape[1], 4).fill_(1) + x,
    "zeros_like": lambda x: torch.cat([torch.zeros_like(x), x, torch.ones_like(x)], 1),
    "full_like": lambda x: torch.where(x > 0, x, torch.full_like(x, 7)),
    "truth values": lambda x: (
        torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None] & (x[:, :, :1] > 0)
    ),
    "arange": lambda x: torch.arange(x.shape[1])[None, :, None] + x,
    "arange from a size": lambda x: torch.arange(1, x.shape[1] + 1)[None] * x[..., 0],
    "arange in steps": lambda x: torch.arange(0, 2 * x.shape[1], 2) + x[..., 0],
    "arange of fractions": lambda x: torch.arange(x.shape[1], dtype=torch.float32) / 2 + x[..., 0],
    "arange, short": lambda x: torch.arange(x.shape[1], dtype=torch.int32) + x[..., 0].int(),
    "distances": lambda x: (
        (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])[None]).abs().float() @ x
    ),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "repeat by a size": lambda x: x[:, :1].repeat(1, x.shape[1], 1) + x,
    "repeat with more axes": lambda x: x.repeat(2, 1, 3, 1),
    "expand": lambda x: x[:, None].expand(-1, 3, -1, -1),
    "expand to a size": lambda x: x[:, :1].expand(x.shape[0], x.shape[1], 4) + x,
    "expand in front": lambda x: x[0].expand(x.shape[0], -1, -1) - x,
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "size as a number": lambda x: x / x.shape[1] + x.shape[0],
    "size in a comparison": lambda x: torch.arange(8)[None] < x.shape[1] - 2,
    "scalar tensor": lambda x: x + torch.tensor(x.shape[1]),
    "flattened": lambda x: x.reshape(x.shape[0] * x.shape[1], 4).sum(1),
    "padded": lambda x: nn.functional.pad(x, (0, 0, 1, 2), value=3.0),
    "shifted": lambda x: torch.cat([x.new_zeros(x.shape[0], 1, 4), x[:, :-1]], 1),
}


@pytest.mark.parametrize("name", MADE)
def test_made_of_sizes(name: str, tmp_path: Path) -> None:
    """The export's own check compares it at two sizes."""
    axes = {0: Dim("B"), 1: Dim("S", min=3)}
    x = torch.randn(2, 6, 4)
    einfold.export_onnx(Call(MADE[name]), tmp_path / "a", (x,), dynamic_shapes=(axes,))
