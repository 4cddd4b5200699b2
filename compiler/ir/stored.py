"""Weights that come in codes: their pieces are kept as long as a pass only picks or stacks rows.

A checkpoint may hold a weight as a scheme stores it. Such a weight is read like any other, by `load`, and
the pass that stores weights finds its pieces beside it and rounds nothing again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .quant.scheme import Scheme
from .types import DTYPES
from .weights import Weight, derive


@dataclass(frozen=True, eq=False)
class StoredWeight(Weight):
    """A weight [.., N, M] that a scheme holds already; `load` gives what its pieces stand for, in float32."""

    scheme: Scheme
    pieces: Mapping[str, Weight]
    """As `Scheme.pieces` names them, in that order."""

    @staticmethod
    def of(scheme: Scheme, shape: tuple[int, ...], pieces: Mapping[str, Weight]) -> StoredWeight:
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


def numbers(data: Tensor | Weight) -> Tensor:
    """The numbers of a weight, read where it is yet to be read."""
    return data.load() if isinstance(data, Weight) else data


def cast(weight: Weight, dtype: torch.dtype) -> Weight:
    """The weight in another type; itself where it has that already."""
    if weight.dtype == dtype:
        return weight
    return Weight(weight.shape, dtype, lambda: weight.load().to(dtype))


def stacked(weights: Sequence[Weight]) -> Weight:
    """Weights behind one another along their first axis; in codes where all of them are, in one scheme."""
    shape = (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:])
    schemes = {scheme_of(weight) for weight in weights}
    scheme = next(iter(schemes))
    if len(schemes) == 1 and scheme is not None and not scheme.shared:
        parts = [weight.pieces for weight in weights if isinstance(weight, StoredWeight)]
        pieces = {name: _cat([part[name] for part in parts]) for name in parts[0]}
        return StoredWeight.of(scheme, shape, pieces)
    return _cat(weights)


def picked(weight: Weight, rows: Tensor) -> Weight:
    """Rows of a weight, in the order of their numbers; in codes where it is."""
    if isinstance(weight, StoredWeight) and not weight.scheme.shared:
        pieces = {name: _pick(piece, rows) for name, piece in weight.pieces.items()}
        return StoredWeight.of(weight.scheme, (len(rows), *weight.shape[1:]), pieces)
    return _pick(weight, rows)


def scheme_of(weight: Weight) -> Scheme | None:
    """The scheme that a weight comes in; None for one that comes as it is."""
    return weight.scheme if isinstance(weight, StoredWeight) else None


def _cat(weights: Sequence[Weight]) -> Weight:
    shape = (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:])

    def compute() -> tuple[Tensor]:
        return (torch.cat([weight.load() for weight in weights]),)

    return derive([(shape, weights[0].dtype)], compute)[0]


def _pick(weight: Weight, rows: Tensor) -> Weight:
    shape = (len(rows), *weight.shape[1:])
    return derive([(shape, weight.dtype)], lambda: (weight.load().index_select(0, rows),))[0]
