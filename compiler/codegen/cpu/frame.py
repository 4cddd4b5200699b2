"""Tensors over named ranks, and the sizes of ranks as the tensors of a call give them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...ir.cascade.plan import Plan
from .functions import FUNCTIONS
from .tanh import quick_tanh

Dim = tuple[str, ...]


class NotLoweredError(Exception):
    """This way of lowering does not express the plan; the message says why."""


@dataclass(frozen=True)
class Signature:
    """The tensors of a graph that a plan reads and writes: a name in the plan, and ranks a dimension.

    `operators` are those of ATen that the graph computes scores, and what follows from them, with.
    `known` has the masks among the inputs that are the same in every call, as arrays.
    """

    inputs: tuple[tuple[str, tuple[Dim, ...]], ...]
    outputs: tuple[tuple[str, tuple[Dim, ...]], ...]
    sizes: Mapping[str, int]
    dtypes: tuple[torch.dtype, ...]
    operators: tuple[str, ...] = ()
    known: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Value:
    """A tensor with a rank for each of its dimensions."""

    tensor: torch.Tensor
    ranks: Dim

    def over(self, order: Sequence[str]) -> torch.Tensor:
        """The tensor with dimensions in this order, of size one where it has no such rank."""
        own = [rank for rank in order if rank in self.ranks]
        tensor = self.tensor
        if tuple(own) != self.ranks:
            tensor = tensor.permute([self.ranks.index(rank) for rank in own])
        for at, rank in enumerate(order):
            if rank not in self.ranks:
                tensor = tensor.unsqueeze(at)
        return tensor


@dataclass
class Frame:
    """What a call works on: sizes of ranks, values by name, and the type that arithmetic is done in.

    `virtual` has the ranks whose tensors hold their virtual coordinates too, behind the real ones. A
    lowering leaves it empty and joins with what they add (`with_virtual`), so that nothing is copied.
    """

    sizes: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype = torch.float32
    virtual: Mapping[str, int] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    #: Inputs that come as numbers. They stay numbers, which Inductor lets vary without compiling again.
    numbers: dict[str, Any] = field(default_factory=dict)
    #: Functions of one tensor. Lowerings have quicker ones (`of`), references those of torch.
    functions: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = field(
        default_factory=lambda: FUNCTIONS
    )

    @classmethod
    def of(cls, plan: Plan, signature: Signature, tensors: Sequence[Any]) -> Frame:
        """The inputs, tensors or numbers, over their ranks.

        Raises NotLoweredError where the size of a rank is not known.
        """
        device = next(x.device for x in tensors if isinstance(x, torch.Tensor))
        quick = {**FUNCTIONS, "tanh": quick_tanh}
        frame = cls(_sizes(plan, signature, tensors), device, functions=quick)
        for (name, dims), tensor in zip(signature.inputs, tensors, strict=True):
            if not isinstance(tensor, torch.Tensor):
                frame.numbers[name] = tensor
                continue
            ranks = tuple(rank for dim in dims for rank in dim)
            shape = frame.shape(ranks)
            split = any(len(dim) != 1 for dim in dims)
            frame.values[name] = Value(tensor.reshape(shape) if split else tensor, ranks)
        return frame

    def size(self, rank: str) -> Any:
        """How many real coordinates a rank has."""
        if rank not in self.sizes:
            raise NotLoweredError(f"the size of rank {rank} is known from no input")
        return self.sizes[rank]

    def length(self, rank: str) -> Any:
        """How many coordinates of a rank its tensors hold."""
        return self.size(rank) + self.virtual.get(rank, 0)

    def shape(self, ranks: Sequence[str]) -> list[Any]:
        """The shape of a tensor over these ranks."""
        return [self.length(rank) for rank in ranks]

    def count(self, ranks: Sequence[str]) -> Any:
        """How many elements a tensor over these ranks has."""
        total: Any = 1
        for rank in ranks:
            total = total * self.length(rank)
        return total

    def results(self, signature: Signature) -> tuple[torch.Tensor, ...]:
        """The outputs in the graph's own dimensions and types."""
        found = []
        for (name, dims), dtype in zip(signature.outputs, signature.dtypes, strict=True):
            ranks = [rank for dim in dims for rank in dim]
            shape = [self.count(dim) for dim in dims]
            tensor = self.values[name].over(ranks).expand(self.shape(ranks))
            found.append(tensor.reshape(shape).to(dtype))
        return tuple(found)


def _sizes(plan: Plan, signature: Signature, tensors: Sequence[Any]) -> dict[str, Any]:
    """Sizes of ranks: of dimensions that are one rank, of fixed dimensions, and what then remains."""
    dims = [
        (dim, size)
        for (_, own), tensor in zip(signature.inputs, tensors, strict=True)
        if own
        for dim, size in zip(own, tensor.shape, strict=True)
    ]
    sizes: dict[str, Any] = {}
    for dim, size in dims:
        if len(dim) == 1:
            sizes.setdefault(dim[0], size)
        elif isinstance(size, int):
            sizes |= {rank: signature.sizes[rank] for rank in dim if rank not in sizes}
    for name, declared in plan.ranks.items():
        if declared.extent.isdigit():
            sizes.setdefault(name, int(declared.extent))
    for dim, size in dims:
        unknown = [rank for rank in dim if rank not in sizes]
        if len(unknown) > 1:
            raise NotLoweredError("a dimension of varying size is made of several ranks")
        for rank in unknown:
            known = [sizes[other] for other in dim if other != rank]
            sizes[rank] = size // math.prod(known)
    return sizes
