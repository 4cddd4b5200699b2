"""Weights that come in codes: their pieces are kept as long as a pass only picks or stacks rows.

A checkpoint may hold a weight as a scheme stores it. Such a weight is read like any other, by `load`, and
the pass that stores weights finds its pieces beside it and rounds nothing again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .quant.scheme import Scheme
from .types import DTYPES
from .weights import Weight, derive

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class StoredWeight(Weight):
    """A weight [.., N, M] that a scheme holds already; `load` gives what its pieces stand for, in float32."""

    scheme: Scheme
    pieces: Mapping[str, Weight]
    """As `Scheme.pieces` names them, in that order."""

    @staticmethod
    def holding(
        scheme: Scheme, shape: tuple[int, ...], pieces: Mapping[str, Weight]
    ) -> StoredWeight:
        """Raises ValueError where these are other pieces than a weight of the shape has."""
        wanted = {n: (size, DTYPES[kind]) for n, (size, kind) in scheme.pieces(shape).items()}
        given = {name: (piece.shape, piece.dtype) for name, piece in pieces.items()}
        if wanted != given:
            raise ValueError(f"{scheme} stores {list(shape)} as {wanted}, not as {given}")

        def load() -> Tensor:
            found = {name: pieces[name].load() for name in wanted}
            return scheme.dequantize(found, shape[-1])

        return StoredWeight(
            shape, torch.float32, load, scheme, {name: pieces[name] for name in wanted}
        )


@dataclass(frozen=True, eq=False)
class TurnedWeight(Weight):
    """A weight that a model has with rows and columns exchanged, [.., M, N], beside how it is stored."""

    stored: StoredWeight

    @staticmethod
    def around(stored: StoredWeight) -> TurnedWeight:
        *lead, rows, columns = stored.shape
        shape = (*lead, columns, rows)
        return TurnedWeight(shape, stored.dtype, lambda: stored.load().transpose(-1, -2), stored)


def numbers(data: Tensor | Weight) -> Tensor:
    """The numbers of a weight, read where it is yet to be read."""
    return data.load() if isinstance(data, Weight) else data


def cast(weight: Weight, dtype: torch.dtype) -> Weight:
    """The weight in another type; itself where it has that already."""
    if weight.dtype == dtype:
        return weight
    return Weight(weight.shape, dtype, lambda: weight.load().to(dtype))


def stacked(weights: Sequence[Weight]) -> Weight:
    """The rows of weights behind one another; in codes where all of them are, in one scheme."""
    axis = _axis_of_rows(weights[0])
    schemes = {scheme_of(weight) for weight in weights}
    scheme = next(iter(schemes))
    if len(schemes) == 1 and scheme is not None and not scheme.shared:
        parts = [weight.pieces for weight in weights if isinstance(weight, StoredWeight)]
        pieces = {name: _cat([part[name] for part in parts], axis) for name in parts[0]}
        rows = sum(weight.shape[axis] for weight in weights)
        return StoredWeight.holding(scheme, _with(weights[0].shape, axis, rows), pieces)
    return _cat(weights, axis)


def picked(weight: Weight, rows: Tensor) -> Weight:
    """Rows of a weight, in the order of their numbers; in codes where it is."""
    axis = _axis_of_rows(weight)
    if isinstance(weight, StoredWeight) and not weight.scheme.shared:
        pieces = {name: _pick(piece, rows, axis) for name, piece in weight.pieces.items()}
        return StoredWeight.holding(weight.scheme, _with(weight.shape, axis, len(rows)), pieces)
    return _pick(weight, rows, axis)


def moved(node: fx.Node, weights: Sequence[Weight]) -> Weight | None:
    """What a call makes of weights in codes that it reads, where it only moves rows; None where it does more,
    or they are not in codes."""
    first: Any = node.args[0]
    options: list[Any] = list(node.args[1:])
    if node.target is aten.transpose.int and isinstance(weights[0], TurnedWeight):
        turned = weights[0]
        last = {len(turned.shape) - 1, len(turned.shape) - 2}
        axes = {int(axis) % len(turned.shape) for axis in options}
        return turned.stored if axes == last else None
    if not all(isinstance(weight, StoredWeight) for weight in weights):
        return None
    axis = _axis_of_rows(weights[0])
    if node.target is aten.slice.Tensor and options[:1] == [axis]:
        every = torch.arange(weights[0].shape[axis])
        start, end, step = (*options[1:], None, None, None)[:3]
        return picked(weights[0], every[slice(start, end, step)])
    if node.target is aten.cat.default and options == [axis] and len(first) == len(weights):
        return stacked(weights)
    return None


def scheme_of(weight: Weight) -> Scheme | None:
    """The scheme that a weight comes in; None for one that comes as it is."""
    return weight.scheme if isinstance(weight, StoredWeight) else None


def _axis_of_rows(weight: Weight) -> int:
    return max(0, len(weight.shape) - 2)


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _cat(weights: Sequence[Weight], axis: int) -> Weight:
    size = sum(weight.shape[axis] for weight in weights)

    def compute() -> tuple[Tensor]:
        return (torch.cat([weight.load() for weight in weights], axis),)

    return derive([(_with(weights[0].shape, axis, size), weights[0].dtype)], compute)[0]


def _pick(weight: Weight, rows: Tensor, axis: int) -> Weight:
    shape = _with(weight.shape, axis, len(rows))
    return derive([(shape, weight.dtype)], lambda: (weight.load().index_select(axis, rows),))[0]
