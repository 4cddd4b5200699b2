"""Runs plans in NumPy and float64: tiles in any order, in sequence or as a tree of merges.

The reference for generated kernels, and the check that a derived plan means what its cascade means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .cascade import Statement
from .evaluate import (
    Array,
    Frame,
    evaluate_expr,
    evaluate_statement,
    frame_of,
    pad_inputs,
    run_statements,
)
from .expr import Expr, reads
from .operators import REDUCTIONS
from .plan import OLD, Plan, Reference, State, frame_cascade

Values = dict[str, Array]


@dataclass(frozen=True)
class Runner:
    """A plan with its inputs.

    `lazy` keeps a free reference until its source has moved by more than this; `static` takes the
    plan's static references. Values are arrays over the ranks that the plan names.
    """

    plan: Plan
    frame: Frame
    values: Mapping[str, Array]
    lazy: float | None = None

    @classmethod
    def of(
        cls,
        plan: Plan,
        arrays: Mapping[str, Array],
        lazy: float | None = None,
        static: bool = False,
        sizes: Mapping[str, int] | None = None,
    ) -> Runner:
        """A runner for inputs by name, `sizes` for ranks that no input has. Raises IRError for shapes."""
        plan = plan.with_static_references() if static else plan
        cascade = frame_cascade(plan)
        frame = frame_of(cascade, arrays, sizes)
        values = pad_inputs(cascade, frame, arrays)
        with np.errstate(all="ignore"):
            run_statements(plan.before, frame, values)
        return cls(plan, frame, values, lazy)

    @property
    def length(self) -> int:
        """How many coordinates the streamed rank has, virtual ones included."""
        return len(self.frame.coordinates(self.plan.rank))

    def start(self) -> Values:
        """The states before anything was streamed."""
        found: Values = {}
        for step in self.plan.steps:
            fill = REDUCTIONS[step.op][0] if isinstance(step, State) else np.nan
            shape = [len(self.frame.coordinates(rank)) for rank in step.ranks]
            found[step.name] = np.full(shape, fill)
        return found

    def update(self, old: Values, coordinates: Array) -> Values:
        """The states after one more tile of the streamed rank."""
        frame = self.frame.restricted(self.plan.rank, coordinates)
        tile: Values = {}
        for name, value in self.values.items():
            ranks = self.plan.ranks_of(name)
            at = ranks.index(self.plan.rank) if self.plan.rank in ranks else None
            tile[name] = value if at is None else np.take(value, coordinates, at)
        with np.errstate(all="ignore"):
            run_statements(self.plan.stream, frame, tile)
            return self._walk([old], tile, frame)

    def merge(self, a: Values, b: Values) -> Values:
        """The states of two disjoint parts of the streamed rank, joined."""
        with np.errstate(all="ignore"):
            return self._walk([a, b], None, self.frame)

    def _walk(self, parts: list[Values], tile: Values | None, frame: Frame) -> Values:
        new: Values = {}
        #: References as bodies and corrections read them.
        clean: Values = {}
        for step in self.plan.steps:
            if isinstance(step, Statement):
                new[step.name] = evaluate_statement(step, frame, {**self.values, **new})
            elif isinstance(step, Reference):
                value = self._renew(step, parts, new)
                new[step.name] = value
                clean[step.name] = _clean(value)
            else:
                start, join = REDUCTIONS[step.op]
                value = np.asarray(start)
                for part in parts:
                    value = join(value, self._corrected(step, part, clean, frame))
                if tile is not None:
                    body = Statement(step.name, step.ref.indices, step.body, step.op, step.over)
                    value = join(value, evaluate_statement(body, frame, {**tile, **clean}))
                new[step.name] = value
        return new

    def _renew(self, step: Reference, parts: list[Values], new: Values) -> Array:
        if not step.source:
            shape = [len(self.frame.coordinates(rank)) for rank in step.ranks]
            return np.full(shape, float(step.static or 0.0))
        value = new[step.source]
        if self.lazy is None or not step.free or step.kind != "scale":
            return value
        kept = parts[0][step.name]
        for part in parts[1:]:
            kept = np.fmax(kept, part[step.name])
        # A maximum only rises, but one that counts as 0 where there is no key yet may fall.
        stays = np.isfinite(kept) & np.isfinite(value) & (np.abs(value - kept) <= self.lazy)
        return np.where(stays, kept, value)

    def _corrected(self, state: State, part: Values, clean: Values, frame: Frame) -> Array:
        old = part[state.name]
        if state.correct is None:
            return old
        past = {name + OLD: value for name, value in part.items()}
        for reference in self.plan.references:
            past[reference.name + OLD] = _clean(part[reference.name])
        env = {**self.values, **past, **clean}
        corrected = self._spread(state.correct, state, env, frame)
        zero = np.asarray(True)
        for name in {read.tensor.removesuffix(OLD) for read in reads(state.correct)}:
            if any(other.name == name for other in self.plan.states):
                ranks = self.plan.ranks_of(name)
                zero = zero & _over(part[name] == 0, ranks, state.ranks)
        return np.where(zero, old, corrected)

    def _spread(self, expr: Expr, state: State, env: Mapping[str, Array], frame: Frame) -> Array:
        shape = [len(frame.coordinates(rank)) for rank in state.ranks]
        return np.broadcast_to(evaluate_expr(expr, list(state.ranks), frame, env), shape)

    def finish(self, states: Values) -> Values:
        """The outputs. Those that carry the streamed rank are computed in a second pass."""
        values = {**self.values, **states}
        with np.errstate(all="ignore"):
            run_statements(self.plan.finish, self.frame, values)
            if any(self.plan.rank in self.plan.ranks_of(name) for name in self.plan.outputs):
                run_statements([*self.plan.stream, *self.plan.emit], self.frame, values)
        return {name: self._output(name, values[name]) for name in self.plan.outputs}

    def _output(self, name: str, value: Array) -> Array:
        ranks = self.plan.ranks_of(name)
        real = value[tuple(slice(0, self.frame.sizes[rank]) for rank in ranks)]
        return np.where(np.isnan(real), 0.0, real) if self.plan.dead == "zero" else real

    def in_sequence(self, tiles: Sequence[Array]) -> Values:
        """The outputs after streaming tiles one after another."""
        states = self.start()
        for tile in tiles:
            states = self.update(states, tile)
        return self.finish(states)

    def as_tree(self, tiles: Sequence[Array], random: np.random.Generator) -> Values:
        """The outputs when each tile starts afresh and random pairs are merged until one is left."""
        parts = [self.update(self.start(), tile) for tile in tiles] or [self.start()]
        while len(parts) > 1:
            a = parts.pop(int(random.integers(len(parts))))
            b = parts.pop(int(random.integers(len(parts))))
            parts.append(self.merge(a, b))
        return self.finish(parts[0])


def _clean(reference: Array) -> Array:
    """A reference as bodies and corrections read it."""
    return np.where(np.isfinite(reference), reference, 0.0)


def _over(array: Array, ranks: Sequence[str], target: Sequence[str]) -> Array:
    """`array` over `ranks`, spread over `target`, which has them all."""
    order = sorted(range(len(ranks)), key=lambda i: target.index(ranks[i]))
    array = np.transpose(array, order)
    shape = [array.shape[[ranks[i] for i in order].index(r)] if r in ranks else 1 for r in target]
    return array.reshape(shape)


def random_tiles(length: int, random: np.random.Generator) -> list[Array]:
    """All coordinates, shuffled into tiles of random sizes, more than one where there is a choice."""
    order = random.permutation(length)
    if length < 2:
        return [order]
    cuts = np.sort(random.integers(1, length, size=int(random.integers(1, length))))
    return [tile for tile in np.split(order, cuts) if len(tile)]
