"""The steps of a plan, in a tile or in a merge: states corrected, references renewed.

Edge rules, as the plan states them: a reference that is not finite is read as 0, and what is 0 stays 0
under a correction whose factor overflows; factors are capped for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...ir.cascade.cascade import Statement
from ...ir.cascade.expr import Apply, Expr, Ref, reads
from ...ir.cascade.operators import REDUCTIONS
from ...ir.cascade.plan import OLD, Plan, Reference, State, Step
from .block import Block
from .memory import shape
from .reduce import joined, reduce
from .values import TEST, Value, number, operate

Values = dict[str, Value]

#: Nearly the largest float32: a factor of a state that is 0 anyway.
_CAP = 3e38


def carried(plan: Plan, lazy: bool) -> list[Step]:
    """The steps whose values a part of the stream leaves behind; the others follow from these."""
    steps = {step.name: step for step in plan.steps}
    needed = {step.name for step in plan.states}
    for reference in plan.references:
        if lagging(reference, lazy):
            needed.add(reference.name)
        needed |= {reference.source} - {""}
    for state in plan.states:
        if state.correct is not None:
            old = {
                r.tensor.removesuffix(OLD) for r in reads(state.correct) if r.tensor.endswith(OLD)
            }
            needed |= {name for name in old if not isinstance(steps[name], Reference)}
    return [step for step in plan.steps if step.name in needed]


def lagging(reference: Reference, lazy: bool) -> bool:
    """Whether a reference has a value of its own, beside its source's."""
    return lazy and reference.free and reference.kind == "scale" and bool(reference.source)


def starting(block: Block, step: Step) -> str:
    """The source of a value before anything is streamed."""
    axes = block.kernel.roles.axes(step.ranks)
    fill = "nan"
    if isinstance(step, State):
        fill = str(REDUCTIONS[step.op][0])
    text = f'float("{fill}")' if fill != "0.0" else fill
    if not axes:
        return f"tl.full((), {text}, tl.float32)"
    return f"tl.full({shape(block.kernel, axes)}, {text}, tl.float32)"


class Walk:
    """One walk over the steps: `parts` have the values so far, and `tile` says that a tile is added."""

    def __init__(
        self,
        block: Block,
        parts: Sequence[Values],
        tile: bool,
        lazy: float | None,
        masked: frozenset[str],
    ) -> None:
        self.block, self.parts, self.tile, self.lazy = block, parts, tile, lazy
        self.masked = masked
        self.plan = block.kernel.plan
        self.order = block.kernel.order
        self.new: Values = {}
        self.kept: dict[tuple[object, ...], Value] = {}

    def run(self) -> Values:
        """Emits all steps; the new values by name."""
        for step in self.plan.steps:
            if isinstance(step, Statement):
                value = self.block.value(step.expr, self.new)
                self.new[step.name] = self._keep(step.name, value)
            elif isinstance(step, Reference):
                self._renew(step)
            else:
                self._update(step)
        return self.new

    def _keep(self, wanted: str, value: Value) -> Value:
        value = value.cast("fp32") if value.type != "fp32" else value
        return self.block.keep(f"{wanted}_new", replace(value, inner=True))

    def _renew(self, step: Reference) -> None:
        if not step.source:
            fixed = number(step.static or 0.0)
            self.new[step.name] = self.block.home(0).bound[step.name] = fixed
            return
        value = self.new[step.source]
        if self.lazy is not None and lagging(step, True):
            value = self._lagged(step, value)
        self.new[step.name] = value
        self.block.bound[step.name] = self._clean(step.name, value)

    def _lagged(self, step: Reference, value: Value) -> Value:
        kept = self.parts[0][step.name]
        for part in self.parts[1:]:
            # A part that saw nothing has NaN here, which a maximum passes over.
            kept = operate("max", [kept, part[step.name]], self.order)
        moved = operate("abs", [operate("sub", [value, kept], self.order)], self.order)
        near = operate("le", [moved, number(self.lazy or 0.0)], self.order)
        stays = Value(
            f"({near.text}) & ({operate('isfinite', [kept], self.order).text})"
            f" & ({operate('isfinite', [value], self.order).text})",
            value.axes,
            "i1",
            True,
            TEST,
        )
        return self._keep(step.name, operate("where", [stays, kept, value], self.order))

    def _update(self, step: State) -> None:
        axes = tuple(self.block.kernel.roles.axes(step.ranks))
        value: Value | None = None
        for at, part in enumerate(self.parts):
            corrected = self._corrected(step, at, part)
            value = corrected if value is None else joined(self.block, step.op, value, corrected)
        if self.tile:
            over = self.block.kernel.roles.axes(step.over)
            mask = "live_t" if step.name in self.masked else None
            value = reduce(self.block, step.op, step.body, over, mask=mask, onto=value)
        assert value is not None
        if value.axes != axes:
            value = replace(value, axes=axes, text=f"{value.text} + {starting(self.block, step)}")
        self.new[step.name] = self._keep(step.name, value)

    def _corrected(self, step: State, at: int, part: Values) -> Value:
        old = part[step.name]
        if step.correct is None:
            return old
        env = self._olds(at, part, step)
        factor = _factor(step.correct, step)
        if factor is not None:
            key = (at, factor)
            if key not in self.kept:
                value = operate("min", [self.block.value(factor, env), number(_CAP)], self.order)
                self.kept[key] = self.block.keep("rescale", replace(value, inner=True))
            return operate("mul", [old, self.kept[key]], self.order)
        names = {read.tensor.removesuffix(OLD) for read in reads(step.correct)}
        size: Value | None = None
        for state in self.plan.states:
            if state.name in names:
                mine = operate("abs", [part[state.name]], self.order)
                size = mine if size is None else operate("add", [size, mine], self.order)
        value = self.block.value(step.correct, env)
        if size is not None:
            zero = operate("eq", [size, number(0.0)], self.order)
            value = operate("where", [zero, old, value], self.order)
        return self.block.keep(f"{step.name}_moved", replace(value, inner=True))

    def _olds(self, at: int, part: Mapping[str, Value], step: State) -> Values:
        """Old values by name; a reference is its source's where it follows it at once, and clean."""
        assert step.correct is not None
        found = {f"{name}{OLD}": value for name, value in part.items()}
        for reference in self.plan.references:
            if not any(read.tensor == f"{reference.name}{OLD}" for read in reads(step.correct)):
                continue
            if not reference.source:
                found[f"{reference.name}{OLD}"] = number(reference.static or 0.0)
                continue
            key = ("old", at, reference.name)
            if key not in self.kept:
                value = part.get(reference.name) or part[reference.source]
                self.kept[key] = self._clean(f"{reference.name}_old", value)
            found[f"{reference.name}{OLD}"] = self.kept[key]
        return found

    def _clean(self, wanted: str, value: Value) -> Value:
        finite = operate("isfinite", [value], self.order)
        clean = operate("where", [finite, value, number(0.0)], self.order)
        return self.block.keep(wanted, replace(clean, inner=True))


def _factor(correct: Expr, step: State) -> Expr | None:
    """What a correction multiplies the old value by, where that is all it does."""
    if not isinstance(correct, Apply) or correct.op != "mul":
        return None
    old = f"{step.name}{OLD}"
    for at in (0, 1):
        mine, rest = correct.args[at], correct.args[1 - at]
        if (
            isinstance(mine, Ref)
            and mine.tensor == old
            and all(r.tensor != old for r in reads(rest))
        ):
            # A factor along lanes is no saving, and is kept with its own test.
            return (
                rest if len({r for x in reads(rest) for r in x.ranks}) <= len(step.ranks) else None
            )
    return None
