"""Statements and plans in plain torch: the reference for kernels, and what runs beside them.

The code is that of the one-tile lowering (`cpu/one_tile.py`); here tensors hold their virtual coordinates,
which asks nothing of the form of a plan, and arithmetic is in a type of the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from ...ir.cascade.cascade import Statement
from ...ir.cascade.plan import Plan
from ..cpu.frame import Frame, Value
from ..cpu.one_tile import run_maps, run_whole


class TorchStatements:
    """Runs statements on tensors.

    `virtual` has the ranks with coordinates past the real ones, which tensors have as well; arithmetic
    is in `dtype`, in float32 where that is a half.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        virtual: Mapping[str, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.dtype = dtype
        wide = torch.promote_types(dtype, torch.float32)
        self.frame = Frame(sizes, device, wide, virtual)
        self.ranks: dict[str, tuple[str, ...]] = {}

    def give(self, name: str, ranks: tuple[str, ...], tensor: Tensor) -> None:
        """A tensor over the real coordinates of its ranks; virtual ones read 0."""
        if tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        pads = [size for rank in reversed(ranks) for size in (0, self.frame.virtual.get(rank, 0))]
        tensor = functional.pad(tensor, pads) if any(pads) else tensor
        self.frame.values[name], self.ranks[name] = Value(tensor, ranks), ranks

    def run(self, items: Iterable[Statement]) -> None:
        """Adds the results of statements to the values."""
        for item in items:
            run_maps(self.frame, [item])
            self.ranks[item.name] = item.ranks

    def real(self, name: str) -> Tensor:
        """A value at the real coordinates of its ranks alone."""
        ranks = self.ranks[name]
        whole = self.frame.values[name].over(ranks).expand(self.frame.shape(ranks))
        tensor = whole[tuple(slice(0, self.frame.size(rank)) for rank in ranks)]
        return tensor if tensor.dtype == torch.bool else tensor.to(self.dtype)


def run_plan(
    plan: Plan,
    inputs: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The outputs of a plan for inputs over its ranks, computed in `dtype`."""
    virtual = {name: rank.virtual for name, rank in plan.ranks.items() if rank.virtual}
    device = next(iter(inputs.values())).device
    statements = TorchStatements(sizes, virtual, dtype, device)
    for name, tensor in plan.inputs.items():
        statements.give(name, tensor.ranks, inputs[name])
    run_whole(statements.frame, plan)
    statements.ranks |= {name: plan.ranks_of(name) for name in plan.outputs}
    return {name: statements.real(name) for name in plan.outputs}
