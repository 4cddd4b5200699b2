"""Checks that a plan means what its cascade means; a wrong fold does not get past them.

By algebra, state by state: a correction turns the state under old references into the state under new
ones, is linear in what it corrects, and correcting twice is correcting once (the cocycle that makes
`merge` associative). By numbers, as a whole: random inputs, random tiles in sequence and as a tree,
lazy and static references, against the cascade itself in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sympy as sp

from ....errors import IRError
from ...ir.cascade.cascade import Cascade, Statement
from ...ir.cascade.evaluate import Array, Frame, evaluate, evaluate_expr
from ...ir.cascade.expr import Apply, Const, Expr, Ref, apply, reads, ref, walk
from ...ir.cascade.plan import OLD, Plan, State
from ...ir.cascade.run_plan import Runner, random_tiles
from .freedom import static_value
from .symbolic import Translator, is_zero

#: Float64 against float64, through tilings and a tree: what a correct plan may differ by.
TOLERANCE = 1e-8


class WrongFoldError(IRError):
    """A derived plan does not mean what its cascade means: a fault of the derivation."""


def check_corrections(plan: Plan) -> None:
    """Raises WrongFoldError, naming the state, where a correction is missing or wrong."""
    states = {state.name: state for state in plan.states}
    for state in plan.states:
        moving = [name for name in state.references if _reads(state.body, name)]
        if state.correct is None:
            if moving:
                raise WrongFoldError(
                    f"state {state.name} moves with {', '.join(moving)}, uncorrected"
                )
            continue
        if state.op != "sum":
            raise WrongFoldError(f"state {state.name}: a correction of a {state.op} is not known")
        _check_correction(state, states)


def _check_correction(state: State, states: Mapping[str, State]) -> None:
    assert state.correct is not None
    translator = Translator()
    times = {moment: _at(translator, states, moment) for moment in ("", "'", "''")}
    first = _corrected(translator, state, states, times[""], "", "'")
    if not is_zero(first - times["'"][state.name]):
        raise WrongFoldError(
            f"state {state.name}: the correction does not carry it to new references"
        )
    family = _family(state)
    free = {name: sp.Symbol(f"s_{k}") for k, name in enumerate(sorted(family))}
    once = _corrected(translator, state, states, free, "", "''")
    if not _is_linear(once, list(free.values())):
        raise WrongFoldError(
            f"state {state.name}: the correction is not linear in what it corrects"
        )
    # A state without a correction of its own is the same under every reference.
    halfway = {
        name: _corrected(translator, states[name], states, free, "", "'")
        if states[name].correct is not None
        else free[name]
        for name in family
    }
    twice = _corrected(translator, state, states, halfway, "'", "''")
    if not is_zero(once - twice):
        raise WrongFoldError(f"state {state.name}: correcting twice differs from correcting once")


def _family(state: State) -> set[str]:
    """The states that a correction reads."""
    assert state.correct is not None
    reads = {p.tensor for p in walk(state.correct) if isinstance(p, Ref)}
    references = {name + OLD for name in state.references}
    return {n.removesuffix(OLD) for n in reads - references if n.endswith(OLD)} | {state.name}


def _at(translator: Translator, states: Mapping[str, State], moment: str) -> dict[str, Any]:
    """Every body at one streamed point, with the references of a moment."""
    found = {}
    for name, state in states.items():
        names = {ref: translator.atom(ref + moment) for ref in state.references}
        translator.values = dict(names)
        found[name] = translator.expr(state.body)
    translator.values = {}
    return found


def _corrected(
    translator: Translator,
    state: State,
    states: Mapping[str, State],
    old: Mapping[str, Any],
    before: str,
    after: str,
) -> Any:
    assert state.correct is not None
    values = {name + OLD: value for name, value in old.items() if name not in state.references}
    references = {ref for s in states.values() for ref in s.references}
    values |= {ref + OLD: translator.atom(ref + before) for ref in references}
    values |= {ref: translator.atom(ref + after) for ref in references}
    translator.values = values
    found = translator.expr(state.correct)
    translator.values = {}
    return found


def _is_linear(value: Any, symbols: list[sp.Symbol]) -> bool:
    expanded = sp.expand(value)
    rest = expanded
    for symbol in symbols:
        rest = rest - symbol * sp.diff(expanded, symbol)
        if any(not is_zero(sp.diff(expanded, symbol, other)) for other in symbols):
            return False
    return is_zero(rest)


def _reads(expr: Expr, name: str) -> bool:
    return any(isinstance(part, Ref) and part.tensor == name for part in walk(expr))


def check_again(cascade: Cascade, plans: tuple[Plan, ...], seed: int = 0) -> None:
    """`check_numbers` in a fifth of its time, for plans that were checked once and then lay on a disk.

    Damage, or another's hand, shows in a few tilings. Raises WrongFoldError, or whatever a plan meets that
    does not fit its cascade at all.
    """
    for plan in plans:
        for reference in plan.references:
            # What float64 forgives: a constant too far from the scores.
            if reference.static is not None and reference.static != static_value(plan, reference):
                raise WrongFoldError(f"the static value of {reference.name} is not the plan's own")
    for how, ways in (("open", ("tree", "lazy", "static")), ("large", ("tree",))):
        _check_numbers(cascade, plans, seed, how, ways)
    if not dead_rows_agree(cascade, plans, seed):
        raise WrongFoldError("rows without a live key differ from the cascade")


def check_numbers(cascade: Cascade, plans: tuple[Plan, ...], seed: int = 0) -> None:
    """Raises WrongFoldError where plans, run one after the other, differ from their cascade.

    With every mask open they must agree to the last NaN. Under random masks a plan may keep what the
    statements lose: p log p of an underflown p is 0 * -inf there, and 0 here. With what stands under exp
    a thousand times as large, a reference that does not stabilise shows.
    """
    for how in ("open", "masked", "large"):
        _check_numbers(cascade, plans, seed, how, ("each", "tree", "lazy", "static"))


def _check_numbers(
    cascade: Cascade, plans: tuple[Plan, ...], seed: int, how: str, ways: tuple[str, ...]
) -> None:
    random = np.random.default_rng(seed)
    probe = _Probe.of(cascade, plans, random, 1.0 if how == "open" else 0.7)
    if how == "large":
        probe = probe.changed(lambda value: apply("mul", value, 1000.0))
    expected = probe.expected()
    for way in ways:
        if (how, way) == ("large", "static"):
            continue  # the bounds are of the scores as they are written
        found = probe.run(random, way)
        for name in cascade.outputs:
            lost = ~np.isfinite(expected[name]) if how != "open" else np.asarray(False)
            _compare(name, np.where(lost, found[name], expected[name]), found[name], way)


def dead_rows_agree(cascade: Cascade, plans: tuple[Plan, ...], seed: int = 0) -> bool:
    """Whether plans give what the cascade gives when all that stands under a stabilised exp is -inf."""
    random = np.random.default_rng(seed)
    probe = _Probe.of(cascade, plans, random).changed(lambda value: Const(float("-inf")))
    expected, found = probe.expected(), probe.run(random, "sequence")
    try:
        for name in cascade.outputs:
            _compare(name, expected[name], found[name], "dead rows")
    except WrongFoldError:
        return False
    return True


@dataclass(frozen=True)
class _Probe:
    """A cascade and its plans with inputs, and the streamed tensors that stand under exp."""

    cascade: Cascade
    plans: tuple[Plan, ...]
    sizes: Mapping[str, int]
    arrays: Mapping[str, Array]

    @classmethod
    def of(
        cls,
        cascade: Cascade,
        plans: tuple[Plan, ...],
        random: np.random.Generator,
        share: float = 0.7,
    ) -> _Probe:
        sizes = random_sizes(cascade, random)
        return cls(cascade, plans, sizes, random_inputs(cascade, random, sizes, share))

    def changed(self, change: Callable[[Expr], Expr]) -> _Probe:
        """The same with every streamed tensor under a stabilised exp changed, in cascade and plans."""
        names = set().union(*(_under_exp(plan) for plan in self.plans))
        arrays = dict(self.arrays)
        for name in names & set(self.cascade.inputs):
            value = evaluate_expr(change(ref(name)), [], _NO_FRAME, {name: np.asarray(1.0)})
            arrays[name] = np.where(np.isfinite(value), self.arrays[name] * value, value)
        statements = tuple(
            _changed(item, change) if item.name in names else item
            for item in self.cascade.statements
        )
        cascade = replace(self.cascade, statements=statements)
        plans = tuple(
            replace(plan, stream=tuple(cascade.of(item.name) or item for item in plan.stream))
            for plan in self.plans
        )
        return _Probe(cascade, plans, self.sizes, arrays)

    def expected(self) -> dict[str, Array]:
        return evaluate(self.cascade, self.arrays, self.sizes)

    def run(self, random: np.random.Generator, way: str) -> dict[str, Array]:
        return run_plans(self.plans, self.arrays, random, way, self.sizes)


_NO_FRAME = Frame({}, {}, {}, {})


def _changed(item: Statement, change: Callable[[Expr], Expr]) -> Statement:
    expr = change(item.expr)
    if isinstance(expr, Const):
        return replace(item, expr=expr, op=None, over=())
    return replace(item, expr=expr)


def _compare(name: str, expected: Array, found: Array, how: str) -> None:
    scale = 1 + np.max(np.abs(expected), where=np.isfinite(expected), initial=0)
    if not np.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True):
        raise WrongFoldError(f"output {name} differs from the cascade ({how})")


def run_plans(
    plans: tuple[Plan, ...],
    arrays: Mapping[str, Array],
    random: np.random.Generator,
    way: str = "sequence",
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """The outputs of plans run in order, each over random tiles.

    `way`: "sequence"; "each" coordinate alone; the same with "lazy" references; a "tree" of merges; in
    sequence with "static" references.
    """
    values = dict(arrays)
    for plan in plans:
        inputs = {name: values[name] for name in plan.inputs}
        runner = Runner.of(plan, inputs, 1.0 if way == "lazy" else None, way == "static", sizes)
        tiles = random_tiles(runner.length, random)
        if way in ("each", "lazy"):
            tiles = [np.asarray([at]) for at in random.permutation(runner.length)]
        found = runner.as_tree(tiles, random) if way == "tree" else runner.in_sequence(tiles)
        values |= found
    return values


def random_sizes(cascade: Cascade, random: np.random.Generator, most: int = 6) -> dict[str, int]:
    """3 to `most` coordinates a rank, the same for ranks of one extent."""
    extents = dict.fromkeys(rank.extent for rank in cascade.ranks.values())
    sizes = {extent: int(random.integers(3, most + 1)) for extent in extents}
    return {name: sizes[rank.extent] for name, rank in cascade.ranks.items()}


def random_inputs(
    cascade: Cascade, random: np.random.Generator, sizes: Mapping[str, int], share: float = 0.7
) -> dict[str, Array]:
    """Inputs of the right kinds; this share of truth values is true."""
    found: dict[str, Array] = {}
    for tensor in cascade.inputs.values():
        shape = [sizes[rank] for rank in tensor.ranks]
        if tensor.kind == "bool":
            found[tensor.name] = random.random(shape) < share
        elif tensor.kind == "integer":
            found[tensor.name] = random.integers(0, 4, shape)
        else:
            found[tensor.name] = random.normal(size=shape)
    return found


def _under_exp(plan: Plan) -> set[str]:
    """For each exp with a reference, the first streamed tensor under it."""
    stream = {item.name for item in plan.stream}
    found: set[str] = set()
    for state in plan.states:
        for part in walk(state.body):
            if not isinstance(part, Apply) or part.op != "exp":
                continue
            if any(_reads(part, name) for name in state.references):
                along = [r.tensor for r in reads(part) if plan.rank in r.ranks]
                real = [n for n in along if _is_real(plan, n)]
                found |= {_whole(plan, n) for n in [*(n for n in along if n in stream), *real][:1]}
    return found


def _is_real(plan: Plan, name: str) -> bool:
    return name in plan.inputs and plan.inputs[name].kind == "real"


def _whole(plan: Plan, name: str) -> str:
    """The streamed tensor to change in place of `name` where the plan has taken its statement apart.

    A sum over x + c is kept as one over x, with c added at the end: to change x + c itself would change
    the cascade but not that sum, so x is changed instead.
    """
    stream = {item.name: item for item in plan.stream}
    while name in stream and stream[name].op is None:
        inside = [r.tensor for r in reads(stream[name].expr)]
        others = [
            *(state.body for state in plan.states),
            *(item.expr for item in (*plan.stream, *plan.finish) if item.name != name),
        ]
        apart = {r.tensor for expr in others for r in reads(expr)} & set(inside)
        along = [
            r.tensor
            for r in reads(stream[name].expr)
            if plan.rank in r.ranks and (r.tensor in stream or _is_real(plan, r.tensor))
        ]
        if not apart or not along:
            return name
        name = along[0]
    return name
