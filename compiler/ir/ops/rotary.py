"""Rotary position embedding by table (Su et al. 2021, RoFormer, section 3.2.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .record import OPERATORS, Operator


def rotary_reference(
    x_BSHD: Tensor, positions_BS: Tensor, cos_PR: Tensor, sin_PR: Tensor, interleaved: bool
) -> Tensor:
    """Rotates the first 2R of D coordinates; coordinates past 2R go through untouched.

    Pairs are (i, i + R), or (2i, 2i + 1) where `interleaved`. The tables hold cos and sin of every
    position times the model's attention scaling, as the model itself computes them.
    """
    half = cos_PR.shape[1]
    cos = cos_PR[positions_BS][:, :, None, :]
    sin = sin_PR[positions_BS][:, :, None, :]
    rotated, rest = x_BSHD[..., : 2 * half], x_BSHD[..., 2 * half :]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :half], rotated[..., half:]
    new_first = first * cos - second * sin
    new_second = second * cos + first * sin
    if interleaved:
        turned = torch.stack((new_first, new_second), dim=-1).flatten(-2)
    else:
        turned = torch.cat((new_first, new_second), dim=-1)
    return torch.cat((turned, rest), dim=-1)


#: Positions [B, S] and tables [P, R], None where nothing is rotated, and whether pairs are interleaved.
Rotary = tuple[Tensor | None, Tensor | None, Tensor | None, bool]


def turned(
    x_BSHD: Tensor,
    positions_BS: Tensor | None,
    cos_PR: Tensor | None,
    sin_PR: Tensor | None,
    interleaved: bool,
) -> Tensor:
    """`rotary_reference` where tables are given, x as it is where they are not."""
    if positions_BS is None or cos_PR is None or sin_PR is None:
        return x_BSHD
    return rotary_reference(x_BSHD, positions_BS, cos_PR, sin_PR, interleaved)


@OPERATORS.register
@dataclass(eq=False)
class RotaryEmbedding(Operator):
    """`rotary_reference`."""

    name = "rotary"
    overwrites = (("x_BSHD",),)

    x_BSHD: Tensor
    positions_BS: Tensor
    cos_PR: Tensor
    sin_PR: Tensor
    interleaved: bool

    def run(self) -> Tensor:
        return rotary_reference(
            self.x_BSHD, self.positions_BS, self.cos_PR, self.sin_PR, self.interleaved
        )

    def shapes(self) -> Tensor:
        return torch.empty_like(self.x_BSHD, memory_format=torch.contiguous_format)
