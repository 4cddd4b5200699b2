"""The reference meaning of cascades, in NumPy and float64.

Virtual coordinates follow the real ones; inputs read 0 there and outputs leave them out. A rank may be
restricted to some of its coordinates (`Frame.only`), which is how a plan is run tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....errors import IRError
from .cascade import Cascade, Rank, Statement
from .expr import Const, Expr, Index, Pos, Ref, Size, Virtual
from .operators import OPERATORS, REDUCTIONS

Array = NDArray[Any]


@dataclass(frozen=True)
class Frame:
    """What expressions are evaluated in.

    `sizes` has the real coordinates of each rank; `only` those to evaluate where a rank is cut down to a
    tile (what carries it must be cut alike); `steps` the current step of iterative ranks.
    """

    ranks: Mapping[str, Rank]
    sizes: Mapping[str, int]
    only: Mapping[str, Array]
    steps: Mapping[str, int]

    def coordinates(self, rank: str) -> Array:
        """The coordinates that are evaluated along a rank; virtual ones come last."""
        if rank in self.only:
            return self.only[rank]
        return np.arange(self.sizes[rank] + self.ranks[rank].virtual)

    def restricted(self, rank: str, coordinates: Array) -> Frame:
        """The same frame with one rank cut down."""
        return replace(self, only={**self.only, rank: coordinates})


def frame_of(
    cascade: Cascade, arrays: Mapping[str, Array], known: Mapping[str, int] | None = None
) -> Frame:
    """The frame that the inputs' shapes give, with the sizes of ranks `known` beside them.

    Raises IRError where two inputs disagree, or a rank's size is nowhere to be found.
    """
    sizes: dict[str, int] = dict(known or {})
    for tensor in cascade.inputs.values():
        shape = np.shape(arrays[tensor.name])
        if len(shape) != len(tensor.ranks):
            raise IRError(f"input {tensor.name} has {len(shape)} dimensions, not {tensor.ranks}")
        for rank, size in zip(tensor.ranks, shape, strict=True):
            if sizes.setdefault(rank, size) != size:
                raise IRError(f"input {tensor.name}: {rank} is {size}, elsewhere {sizes[rank]}")
    extents = {r.extent: sizes[name] for name, r in cascade.ranks.items() if name in sizes}
    for name, declared in cascade.ranks.items():
        if name not in sizes:
            extent = declared.extent
            if not extent.isdigit() and extent not in extents:
                raise IRError(f"the extent {extent} of {name} is known from no input")
            sizes[name] = int(extent) if extent.isdigit() else extents[extent]
    return Frame(cascade.ranks, sizes, {}, {})


def pad_inputs(cascade: Cascade, frame: Frame, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs in float64 (truth values stay), with zeros at virtual coordinates."""
    padded = {}
    for tensor in cascade.inputs.values():
        array = np.asarray(arrays[tensor.name])
        if array.dtype != np.bool_:
            array = array.astype(np.float64)
        width = [(0, frame.ranks[rank].virtual) for rank in tensor.ranks]
        padded[tensor.name] = np.pad(array, width) if tensor.ranks else array
    return padded


def evaluate(
    cascade: Cascade, arrays: Mapping[str, Array], sizes: Mapping[str, int] | None = None
) -> dict[str, Array]:
    """The outputs of a cascade for inputs by name, each of the shape that its ranks give.

    `sizes` gives ranks that no input has, such as queries known by their positions alone.
    """
    frame = frame_of(cascade, arrays, sizes)
    values = pad_inputs(cascade, frame, arrays)
    with np.errstate(all="ignore"):
        run_statements(cascade.statements, frame, values)
    return {name: _output(cascade, frame, name, values[name]) for name in cascade.outputs}


def _output(cascade: Cascade, frame: Frame, name: str, value: Array) -> Array:
    ranks = cascade.ranks_of(name)
    real = value[tuple(slice(0, frame.sizes[rank]) for rank in ranks)]
    return np.where(np.isnan(real), 0.0, real) if cascade.dead == "zero" else real


def run_statements(statements: Iterable[Statement], frame: Frame, values: dict[str, Array]) -> None:
    """Adds the results of statements to `values`, walking iterative ranks step by step."""
    pending = list(statements)
    while pending:
        rank = _iterative(pending[0], frame)
        if rank is None or rank in frame.steps:
            item = pending.pop(0)
            _store(item, frame, values, evaluate_statement(item, frame, values))
            continue
        group = []
        while pending and _iterative(pending[0], frame) == rank:
            group.append(pending.pop(0))
        for step in range(frame.sizes[rank]):
            inside = replace(frame, steps={**frame.steps, rank: step})
            for item in group:
                _store(item, inside, values, evaluate_statement(item, inside, values))


def _iterative(item: Statement, frame: Frame) -> str | None:
    """The iterative rank along which a statement is written."""
    for index in item.indices:
        if index.rank and frame.ranks[index.rank].iterative:
            return index.rank
    return None


def _store(item: Statement, frame: Frame, values: dict[str, Array], value: Array) -> None:
    fixed = [i for i in item.indices if not i.rank or i.rank in frame.steps]
    if not fixed:
        values[item.name] = value
        return
    # A tensor that starts at a fixed coordinate grows along it as its steps are written.
    place: list[slice | int] = []
    shape: list[int] = []
    at = 0
    for index in item.indices:
        if index.rank and index.rank not in frame.steps:
            place.append(slice(None))
            shape.append(value.shape[at])
            at += 1
        else:
            step = index.offset + (frame.steps[index.rank] if index.rank else 0)
            place.append(step)
            shape.append(max(step + 1, _length(values.get(item.name), len(shape))))
    values[item.name] = _grown(values.get(item.name), shape)
    values[item.name][tuple(place)] = value


def _length(array: Array | None, axis: int) -> int:
    return array.shape[axis] if array is not None and array.ndim > axis else 0


def _grown(array: Array | None, shape: list[int]) -> Array:
    grown = np.full(shape, np.nan)
    if array is not None and array.ndim == len(shape):
        keep = tuple(slice(0, min(a, b)) for a, b in zip(array.shape, shape, strict=True))
        grown[keep] = array[keep]
    return grown


def evaluate_statement(item: Statement, frame: Frame, values: Mapping[str, Array]) -> Array:
    """The result of one statement over the frame's coordinates, axes in the order of its ranks."""
    kept = [rank for rank in item.ranks if rank not in frame.steps]
    axes = [*kept, *item.over]
    value = evaluate_expr(item.expr, axes, frame, values)
    full = np.broadcast_to(value, [len(frame.coordinates(rank)) for rank in axes])
    if item.op is None:
        return np.array(full)
    start, join = REDUCTIONS[item.op]
    reduce: Any = getattr(join, "reduce")  # noqa: B009 - a ufunc's, which Callable does not declare
    if item.op == "sum" and full.dtype == np.bool_:
        full = full.astype(np.float64)
    reduced: Array = reduce(full, axis=tuple(range(len(kept), len(axes))), initial=start)
    return reduced


def evaluate_expr(expr: Expr, axes: list[str], frame: Frame, values: Mapping[str, Array]) -> Array:
    """The expression over `axes`, each axis of full length or, where nothing varies, of length 1."""
    if isinstance(expr, Const):
        return np.asarray(expr.value)
    if isinstance(expr, Size):
        return np.asarray(float(frame.sizes[expr.rank]))
    if isinstance(expr, Pos) and expr.rank in frame.steps:
        return np.asarray(frame.steps[expr.rank])
    if isinstance(expr, (Pos, Virtual)):
        at = frame.coordinates(expr.rank)
        if isinstance(expr, Virtual):
            at = at == frame.sizes[expr.rank] + expr.number
        return _along(np.asarray(at), [expr.rank], axes)
    if isinstance(expr, Ref):
        return _read(expr, axes, frame, values)
    args = [evaluate_expr(arg, axes, frame, values) for arg in expr.args]
    result: Array = np.asarray(OPERATORS[expr.op].meaning(*args))
    return result


def _read(expr: Ref, axes: list[str], frame: Frame, values: Mapping[str, Array]) -> Array:
    at = [_fixed(index, frame) for index in expr.indices]
    array = values[expr.tensor][tuple(slice(None) if step is None else step for step in at)]
    names = [i.rank for i, step in zip(expr.indices, at, strict=True) if step is None]
    return _along(array, names, axes)


def _fixed(index: Index, frame: Frame) -> int | None:
    if index.end:
        return frame.sizes[index.rank]
    if not index.rank:
        return index.offset
    return frame.steps[index.rank] + index.offset if index.rank in frame.steps else None


def _along(array: Array, ranks: list[str], axes: list[str]) -> Array:
    """`array` with axes named `ranks` spread over `axes`."""
    if len(set(ranks)) != len(ranks):
        raise IRError(f"a read repeats a rank: {ranks}")
    order = sorted(range(len(ranks)), key=lambda i: axes.index(ranks[i]))
    array = np.transpose(array, order)
    places = [axes.index(ranks[i]) for i in order]
    shape = [1] * len(axes)
    for place, size in zip(places, array.shape, strict=True):
        shape[place] = size
    return array.reshape(shape)
