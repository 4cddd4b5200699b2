"""Named weights whose data is computed when it is asked for, and not before.

A pass that concatenates or quantizes weights describes the result (shape, dtype, how to compute it);
code generation streams the weights to a file one at a time. So compiling holds about one copy of the
model, and `estimate` runs the same passes over a model whose weights are never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import IRError


@dataclass(frozen=True, eq=False)
class Weight:
    """One tensor of the graph: what it is, and how to get it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @staticmethod
    def of(tensor: Tensor, dtype: torch.dtype | None = None) -> Weight:
        """A weight that exists, on any device; cast to `dtype` when it is loaded, never before."""
        target = dtype or tensor.dtype
        return Weight(
            tuple(tensor.shape), target, lambda: tensor.detach().to("cpu", target).contiguous()
        )

    @staticmethod
    def absent(shape: Sequence[int], dtype: torch.dtype, name: str) -> Weight:
        """A weight known by its shape alone (a model traced from its config)."""

        def refuse() -> Tensor:
            raise IRError(
                f"weight {name!r} has no data here: the model was traced from its config alone, "
                "or its weights were written to a file already"
            )

        return Weight(tuple(shape), dtype, refuse)


def derive(
    parts: Sequence[tuple[tuple[int, ...], torch.dtype]],
    compute: Callable[[], Sequence[Tensor]],
) -> tuple[Weight, ...]:
    """Weights that one computation gives together, such as codes, scales and zero points.

    The computation runs when the first part is loaded; its results are kept until each part was
    loaded once, then dropped, so parts loaded one after the other are computed once.
    """
    pending: dict[int, Tensor] = {}

    def loader(index: int) -> Callable[[], Tensor]:
        def load() -> Tensor:
            if index not in pending:
                results = compute()
                for place, (result, (shape, dtype)) in enumerate(zip(results, parts, strict=True)):
                    if tuple(result.shape) != shape or result.dtype != dtype:
                        raise IRError(
                            f"a derived weight came out as {result.dtype}{tuple(result.shape)}, "
                            f"expected {dtype}{shape}"
                        )
                    pending[place] = result
            return pending.pop(index).contiguous()

        return load

    return tuple(Weight(shape, dtype, loader(i)) for i, (shape, dtype) in enumerate(parts))


class WeightStore:
    """The weights of a program by name, in the order in which they are written to a file."""

    def __init__(self) -> None:
        self._weights: dict[str, Weight] = {}

    def __getitem__(self, name: str) -> Weight:
        try:
            return self._weights[name]
        except KeyError:
            raise IRError(
                f"the graph names a weight {name!r} that the program does not hold"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def add(self, name: str, weight: Weight) -> str:
        """Adds under `name`, made unique with a number if it is taken; gives the name used."""
        unique, number = name, 1
        while unique in self._weights:
            unique, number = f"{name}.{number}", number + 1
        self._weights[unique] = weight
        return unique

    def release(self, name: str) -> None:
        """Keeps the weight's description and lets go of its data, once it is written elsewhere."""
        weight = self[name]
        self._weights[name] = Weight.absent(weight.shape, weight.dtype, name)

    def restore(self, weights: Mapping[str, Weight]) -> None:
        """Takes back weights whose data was let go."""
        self._weights.update(weights)

    def discard(self, name: str) -> None:
        """Drops a weight, and with it the memory that only it held."""
        self._weights.pop(name, None)

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self._weights.values())
